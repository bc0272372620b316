"""A benchmark reports nothing unless its contenders train the same on the same."""

import math

import pytest

from side_by_side.rows import resample_rows
from side_by_side.sft import UnequalError, check_learnt, check_loss
from side_by_side.shapes import cut_vocabulary
from side_by_side.task import Examples


def test_another_loss_at_the_same_weights_is_refused():
    check_loss("trl-packed x1", 2.0, 2.001, tolerance=1e-3)
    with pytest.raises(UnequalError, match=r"2\.00000 with lorasmith and 2\.01000 with trl-packed x1.*0\.1%"):
        check_loss("trl-packed x1", 2.0, 2.01, tolerance=1e-3)
    with pytest.raises(UnequalError, match="nan"):
        check_loss("trl-packed x1", 2.0, math.nan, tolerance=1e-3)


def test_other_learnt_tokens_are_refused():
    check_learnt("trainer x4", 491, 491)
    with pytest.raises(UnequalError, match="491 with lorasmith, 490 with trainer x4"):
        check_learnt("trainer x4", 491, 490)


def test_contenders_read_the_very_examples_that_were_written(tmp_path):
    examples = Examples([[1, 2, 3], [4, 5]], [[-100, 2, 3], [-100, 5]], [[1], [0, 1]])
    examples.write(tmp_path / "examples.npz")

    read = Examples.read(tmp_path / "examples.npz")

    assert read == examples
    assert [row["input_ids"] for row in read.of_steps(1, 2)] == [[1, 2, 3], [4, 5]]


def test_resampled_rows_are_distinct_and_come_again_from_the_same_seed():
    rows = [
        {"instruction": f"Add {i} apples and 27 pears to the basket", "input": "", "output": f"{i + 27}"}
        for i in (3, 8)
    ]

    drawn = list(resample_rows(rows, 50, seed=1))

    assert drawn == list(resample_rows(rows, 50, seed=1))
    assert len({tuple(row.values()) for row in drawn}) == 50
    with pytest.raises(ValueError, match="do not give 50 distinct ones"):
        list(resample_rows([{"instruction": "Hi", "input": "", "output": "Hi"}], 50))


def test_a_cut_vocabulary_keeps_only_merges_that_it_has_the_result_of():
    tokenizer = {"model": {"vocab": {"a": 0, "b": 1, "ab": 2, "aba": 3}, "merges": ["a b", ["ab", "a"]]}}

    cut_vocabulary(tokenizer, 3)

    assert tokenizer["model"] == {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
