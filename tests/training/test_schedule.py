"""The learning rate, the order of examples and the split are functions of settings and step."""

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from lorasmith.training.schedule import (
    examples_of_step,
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


def test_each_epoch_takes_every_example_once_in_a_new_order():
    settings = TrainingSettings(batch_size=4)
    epochs = [[i for s in range(3) for i in examples_of_step(3 * e + s, 10, settings)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]
    assert examples_of_step(1, 10, settings) == examples_of_step(1, 10, settings)
    assert examples_of_step(0, 10, settings) != examples_of_step(
        0, 10, TrainingSettings(batch_size=4, seed=1)
    )
    assert len(examples_of_step(2, 10, settings)) == 2  # what is left


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


def test_the_suggested_rate_shrinks_with_the_model():
    assert suggest_learning_rate("llama", 2000) == pytest.approx(5e-4)
    assert suggest_learning_rate("llama", 576) == pytest.approx(1.32e-3, rel=0.01)
    assert suggest_learning_rate("qwen2", 576) == pytest.approx(5.5e-4, rel=0.01)


@pytest.mark.parametrize("rate", [0, -1e-4, float("inf"), float("nan")])
def test_a_rate_that_teaches_nothing_is_refused(rate):
    with pytest.raises(ValueError, match="above 0"):
        TrainingSettings(learning_rate=rate)
