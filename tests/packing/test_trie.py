"""Packs hold every example once, share what is shared, and never more than they may."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.data.tokens import IGNORE_INDEX, TokenizedExample
from lorasmith.packing.cost import PackCost
from lorasmith.packing.plan import predict_gain
from lorasmith.packing.trie import Segment, count_tokens, pack_examples

P, A, B, C, D, E, F = 10, 11, 12, 13, 14, 15, 16


def make(ids: list[int], num_learnt: int = 1) -> TokenizedExample:
    labels = np.full(len(ids), IGNORE_INDEX, np.int32)
    labels[len(ids) - num_learnt :] = ids[len(ids) - num_learnt :]
    return TokenizedExample(np.array(ids, np.int32), labels, "t:1")


def pack(examples, **options):
    options = {"max_tokens": 100, "min_prefix_tokens": 1, **options}
    return pack_examples(examples, range(len(examples)), **options)


def test_the_drawing_in_the_docstring():
    (only,) = pack([make([P, P, A, B, C, 9]), make([P, P, A, D, 9]), make([P, P, E, F, 9])])
    assert set(only.segments) == {
        Segment(0, 2, -1),
        *(Segment(s.start, s.stop, s.parent) for s in only.segments[1:]),
    }
    tokens = [only.input_ids[s.start : s.stop].tolist() for s in only.segments]
    parents = {
        tuple(t): tuple(tokens[s.parent]) if s.parent >= 0 else None
        for t, s in zip(tokens, only.segments, strict=True)
    }
    assert parents == {(P, P): None, (A,): (P, P), (B, C): (A,), (D,): (A,), (E, F): (P, P)}
    positions = {
        tuple(t): only.position_ids[s.start : s.stop].tolist()
        for t, s in zip(tokens, only.segments, strict=True)
    }
    assert positions == {(P, P): [0, 1], (A,): [2], (B, C): [3, 4], (D,): [3], (E, F): [2, 3]}
    assert only.num_tokens == 8


def test_targets_are_shifted_and_branch_from_the_last_shared_token():
    (only,) = pack([make([P, P, A], 1), make([P, P, B], 1)])
    assert only.input_ids.tolist() == [P, P]
    assert only.logit_positions.tolist() == [1, 1]
    assert sorted(only.targets.tolist()) == [A, B]


def test_equal_examples_stand_once_and_weigh_twice():
    (only,) = pack([make([P, A, B], 2), make([P, A, B], 2)])
    assert only.num_tokens == 2
    assert only.weights.tolist() == [2.0, 2.0]
    assert only.num_learnt == 4


def test_an_example_that_is_a_prefix_of_another_adds_no_token():
    (only,) = pack([make([P, A, B, C], 1), make([P, A, B], 1)])
    assert only.num_tokens == 3
    assert dict(zip(only.targets.tolist(), only.logit_positions.tolist(), strict=True)) == {B: 1, C: 2}


def test_short_prefixes_are_repeated():
    examples = [make([P, P, A, 9]), make([P, P, B, 9])]
    assert pack(examples, min_prefix_tokens=3)[0].num_tokens == 6
    assert pack(examples, min_prefix_tokens=2)[0].num_tokens == 4


def test_without_sharing_each_example_is_one_segment_in_the_given_order():
    (only,) = pack([make([P, B, 9]), make([P, A, 9])], share_prefixes=False)
    assert only.input_ids.tolist() == [P, B, P, A]
    assert only.position_ids.tolist() == [0, 1, 0, 1]
    assert only.examples == (0, 1)


def test_packs_are_evened_out_by_cost_not_by_tokens():
    # 6 examples of 9 tokens, one token learnt; 2 of 9 tokens, all learnt: at 10 tokens a learnt one, 8 times as dear.
    examples = [make([100 + i, *range(200, 209)], 1 if i < 6 else 9) for i in range(8)]
    by_tokens = pack(examples, max_tokens=40)
    assert [len(p.examples) for p in by_tokens] == [4, 4]
    by_cost = pack(examples, max_tokens=60, cost=PackCost(per_token=1, per_learnt=10))
    assert [p.examples for p in by_cost] == [(0, 1, 2, 3, 4, 5), (6, 7)]


def test_cost_counts_tokens_learnt_tokens_and_visible_pairs():
    cost = PackCost(per_token=2, per_learnt=6, per_pair=4)
    # Tokens 2 to 4 see 3 + 4 tokens: 2 * 2 + 6 * 1 + 4 * 7 = 38 FLOP, those of 19 tokens.
    assert cost.in_tokens(np.array([2]), np.array([4]), np.array([1])).tolist() == [19]


def test_packs_are_evened_out():
    examples = [make([100 + i, *range(200, 209)]) for i in range(12)]  # 9 tokens each once shifted
    sizes = [p.num_tokens for p in pack(examples, max_tokens=50, share_prefixes=False)]
    assert sizes == [36, 36, 36]  # filled to the brim it would be 45, 45, 18


def test_most_examples_a_pack():
    examples = [make([i, i, 9]) for i in range(10, 20)]
    assert [len(p.examples) for p in pack(examples, max_examples=4)] == [4, 4, 2]


def test_an_example_longer_than_a_pack_gets_its_own():
    packs = pack([make([P, A, 9]), make(list(range(10, 60))), make([P, B, 9])], max_tokens=10)
    assert sorted(i for p in packs for i in p.examples) == [0, 1, 2]
    assert max(p.num_tokens for p in packs) == 49


ids = st.lists(st.integers(10, 14), min_size=2, max_size=12)


@given(st.lists(ids, min_size=1, max_size=12), st.integers(1, 40), st.integers(1, 5), st.booleans())
def test_every_example_can_be_read_back(rows, max_tokens, min_prefix, share):
    examples = [make(row) for row in rows]
    packs = pack(examples, max_tokens=max_tokens, min_prefix_tokens=min_prefix, share_prefixes=share)
    assert sorted(i for p in packs for i in p.examples) == list(range(len(rows)))
    for p in packs:
        assert p.num_tokens <= max_tokens or len(p.examples) == 1
        for place, example in enumerate(p.examples):
            where = p.tokens_of(place)
            assert p.input_ids[where].tolist() == rows[example][:-1]
            assert p.position_ids[where].tolist() == list(range(len(rows[example]) - 1))
        # An owner's token at that offset is the token itself: kept states are looked up this way.
        for token, owner, offset in zip(p.input_ids, p.owners, p.position_ids, strict=True):
            assert rows[owner][offset] == token
        for index, segment in enumerate(p.segments):
            assert segment.start < segment.stop
            assert segment.parent < index
    assert sum(p.num_learnt for p in packs) == len(rows)


@given(st.lists(ids, min_size=1, max_size=12), st.integers(1, 5))
def test_counting_agrees_with_laying_out(rows, min_prefix):
    examples = [make(row) for row in rows]
    packed, shared = count_tokens(examples, min_prefix_tokens=min_prefix)
    assert packed == sum(len(row) - 1 for row in rows)
    (laid_out,) = pack(examples, max_tokens=10_000, min_prefix_tokens=min_prefix)
    assert shared == laid_out.num_tokens


def test_the_gain_is_counted_step_by_step():
    examples = [make([*range(10, 30), 50 + i, 9]) for i in range(8)]
    gain = predict_gain(examples, batch_size=4, order=lambda step: range(4 * step, 4 * step + 4))
    assert (gain.padded, gain.packed, gain.shared) == (8 * 22, 8 * 21, 2 * (20 + 4))
    assert not gain.is_estimate


def test_a_limit_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        pack([make([P, A])], max_tokens=0)
