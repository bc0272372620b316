"""The learning rate, the order of examples and the split are functions of settings and step."""

import numpy as np
import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from lorasmith.data.tokens import TokenizedExample
from lorasmith.training.schedule import (
    StepOrder,
    group_by_prefix,
    group_by_question,
    learning_rate_at,
    split_for_validation,
    suggest_learning_rate,
)
from lorasmith.training.settings import TrainingSettings


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)],
)
def test_without_warm_up_the_schedules_are_those_of_transformers(name, theirs):
    settings = TrainingSettings(lr_schedule=name, warmup_steps=0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = theirs(optimizer, 0, 20)
    for step in range(20):
        assert learning_rate_at(step, 20, settings, 1e-3) == pytest.approx(
            schedule.get_last_lr()[0], rel=1e-12
        )
        optimizer.step()
        schedule.step()


def test_the_warm_up_rises_evenly_and_never_stands_at_zero():
    settings = TrainingSettings(warmup_steps=3, lr_schedule="constant")
    rates = [learning_rate_at(step, 10, settings, 4.0) for step in range(5)]
    assert rates == [1.0, 2.0, 3.0, 4.0, 4.0]


def test_the_warm_up_as_a_share_of_the_steps():
    assert TrainingSettings(warmup_ratio=0.1).num_warmup_steps(95) == 10
    assert TrainingSettings(warmup_ratio=0.1, warmup_steps=0).num_warmup_steps(95) == 0


def epoch(order: StepOrder, number: int, num_steps: int) -> list[list[int]]:
    return [order.examples_of(number * num_steps + step) for step in range(num_steps)]


@pytest.mark.parametrize("groups", [None, np.array([0, 1, 0, 1, 0, 1, 0, 2, 0, 0])])
def test_each_epoch_takes_every_example_once_in_a_new_order(groups):
    order = StepOrder(10, TrainingSettings(batch_size=4), groups)
    first, second = epoch(order, 0, 3), epoch(order, 1, 3)
    assert sorted(i for step in first for i in step) == list(range(10))
    assert sorted(i for step in second for i in step) == list(range(10))
    assert first != second
    assert epoch(order, 0, 3) == first  # whatever was asked before
    assert epoch(StepOrder(10, TrainingSettings(batch_size=4), groups), 1, 3) == second
    assert epoch(StepOrder(10, TrainingSettings(batch_size=4, seed=1), groups), 0, 3) != first
    assert sorted(len(step) for step in first) == [2, 4, 4]


def test_a_group_fills_steps_of_its_own_as_far_as_it_can():
    groups = np.repeat([7, 3, 5], [21, 8, 3])
    order = StepOrder(32, TrainingSettings(batch_size=8), groups)
    for number in range(3):
        kinds = sorted(tuple(sorted(set(groups[step]))) for step in epoch(order, number, 4))
        assert kinds == [(3,), (5, 7), (7,), (7,)]


def test_examples_are_grouped_by_what_they_begin_with():
    rows = [[1, 2, 3, 4], [1, 2, 9], [1, 2, 3, 7], [1, 2], [1, 2]]
    examples = [TokenizedExample(np.array(ids, np.int32), np.array(ids, np.int32), "t:1") for ids in rows]
    groups = group_by_prefix(examples, 3)
    assert groups[0] == groups[2]
    assert len(set(groups.tolist())) == 4  # the two short ones are equal, and too short to be told alike


def test_the_number_of_steps():
    assert TrainingSettings(epochs=2, batch_size=4).num_steps(10) == 6
    assert TrainingSettings(epochs=0.5, batch_size=4).num_steps(16) == 2
    assert TrainingSettings(epochs=2, batch_size=4, max_steps=5).num_steps(10) == 5


def test_the_split_is_seeded_and_disjoint():
    settings = TrainingSettings(validation_share=0.25)
    kept, held_out = split_for_validation(20, settings)
    assert len(held_out) == 5
    assert sorted(kept + held_out) == list(range(20))
    assert split_for_validation(20, settings) == (kept, held_out)
    assert split_for_validation(20, TrainingSettings(validation_share=0.25, seed=9))[1] != held_out


def test_answers_to_one_question_are_held_out_together():
    settings = TrainingSettings(validation_share=0.25)
    assert split_for_validation(20, settings, np.arange(20)) == split_for_validation(20, settings)
    questions = np.arange(20) // 2
    kept, held_out = split_for_validation(20, settings, questions)
    assert not set(questions[kept]) & set(questions[held_out])
    assert len(held_out) == 4  # 5 were asked for
    tiny_share = TrainingSettings(validation_share=0.01)
    assert len(split_for_validation(20, tiny_share, questions)[1]) == 2
    assert len(split_for_validation(20, tiny_share, np.zeros(20, int))[1]) == 1, "one question: row by row"


def test_a_question_is_what_stands_before_the_answer():
    rows = [([1, 2, 3, 4], 2), ([1, 2, 9], 2), ([1, 2, 3, 7], 3)]
    examples = [
        TokenizedExample(np.array(ids, np.int32), np.array([-100] * start + ids[start:], np.int32), "t:1")
        for ids, start in rows
    ]
    assert group_by_question(examples).tolist() == [0, 0, 1]


def test_the_suggested_rate_shrinks_with_the_model():
    assert suggest_learning_rate("llama", 2000) == pytest.approx(5e-4)
    assert suggest_learning_rate("llama", 576) == pytest.approx(1.32e-3, rel=0.01)
    assert suggest_learning_rate("qwen2", 576) == pytest.approx(5.5e-4, rel=0.01)


@pytest.mark.parametrize("rate", [0, -1e-4, float("inf"), float("nan")])
def test_a_rate_that_teaches_nothing_is_refused(rate):
    with pytest.raises(ValueError, match=r"above 0|finite number"):
        TrainingSettings(learning_rate=rate)
