"""Sampling settings say what is wrong in words; the sampler is greedy, seeded, independent of its batch."""

import pytest
import torch

from lorasmith.errors import SettingsError
from lorasmith.generation.sampler import Sampler
from lorasmith.generation.sampling import SamplingSettings, parse_sampling


def test_the_default_is_greedy():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, 1.0]])
    sampler = Sampler(SamplingSettings())
    assert sampler.choose(logits, [sampler.new_dice(), sampler.new_dice()]) == [1, 0]


def test_one_stop_string_may_be_given_alone():
    assert SamplingSettings.model_validate({"stop": "\n\n"}).stop == ("\n\n",)


def test_not_given_values_keep_their_defaults():
    assert parse_sampling(temperature=None, max_tokens=7) == SamplingSettings(max_tokens=7)


def test_all_faults_are_named_together():
    with pytest.raises(SettingsError) as caught:
        parse_sampling(temperature=-1, top_p=0, max_tokens=0, stop=[""], heat=3)
    text = str(caught.value)
    for part in ("temperature=-1", "top_p=0", "max_tokens=0", "a stop string is empty", "heat=3"):
        assert part in text


def test_a_seed_repeats_the_draw_and_another_seed_changes_it():
    logits = torch.zeros(1, 1000)

    def draw(seed: int) -> list[int]:
        sampler = Sampler(SamplingSettings(temperature=1, seed=seed))
        dice = [sampler.new_dice()]
        return [sampler.choose(logits, dice)[0] for _ in range(8)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_without_a_seed_two_draws_differ():
    sampler = Sampler(SamplingSettings(temperature=1))
    first, second = sampler.new_dice(), sampler.new_dice()
    logits = torch.zeros(1, 1_000_000)
    assert sampler.choose(logits, [first]) != sampler.choose(logits, [second])


def test_a_row_draws_the_same_alone_and_in_a_batch():
    sampler = Sampler(SamplingSettings(temperature=1, seed=3))
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    together = sampler.choose(logits, [sampler.new_dice() for _ in range(4)])
    assert together == [sampler.choose(row[None], [sampler.new_dice()])[0] for row in logits]


def test_top_p_leaves_only_the_likeliest_tokens():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    sampler = Sampler(SamplingSettings(temperature=1, top_p=0.7, seed=0))
    dice = [sampler.new_dice()]
    assert {sampler.choose(logits, dice)[0] for _ in range(200)} == {0, 1}


def test_a_low_temperature_sharpens():
    logits = torch.tensor([[1.0, 0.0]])
    sampler = Sampler(SamplingSettings(temperature=0.05, seed=0))
    dice = [sampler.new_dice()]
    assert {sampler.choose(logits, dice)[0] for _ in range(100)} == {0}
