"""Lay examples out so that every shared prefix stands once.

A pack is a trie. Each distinct prefix is one segment, each continuation hangs under it, and a token attends
to its ancestors and to the tokens before it in its own segment. Positions count along the path, so each
example is computed as if it stood alone, and the work is that of the distinct tokens.

Three examples, tokens as letters, the last token of each left out (nothing is predicted from it)::

    example 0   P P a b c        segments   [P P]  [a]      [b c]  [d]    [e f]
    example 1   P P a d          parent      -      0        1      1      0
    example 2   P P e f          layout     P P a  b c d e f
                                 positions  0 1 2  3 4 3 2 3

``b c`` and ``d`` see ``P P a``; ``e f`` sees ``P P``.

Shape letters: T tokens of the pack, N targets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorasmith.data.tokens import IGNORE_INDEX, TokenizedExample
from lorasmith.packing.cost import PackCost


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens ``start`` to ``stop`` of a pack; ``parent`` is the index of the segment they continue, or -1."""

    start: int
    stop: int
    parent: int


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """Some examples of one optimizer step, laid out for one forward pass.

    ``targets[n]`` is the token to be predicted from the hidden state at ``logit_positions[n]``: the shift is
    done here. ``weights[n]`` says how many examples share that very prediction; the loss is the weighted sum.
    Examples are named by the numbers that pack_examples was given.
    """

    input_ids: np.ndarray  # int64 [T]
    position_ids: np.ndarray  # int64 [T]
    owners: np.ndarray  # int64 [T]: an example that the token belongs to, at offset position_ids[t]
    segments: tuple[Segment, ...]  # parents stand before their children
    logit_positions: np.ndarray  # int64 [N]
    targets: np.ndarray  # int64 [N]
    weights: np.ndarray  # float32 [N]
    examples: tuple[int, ...]  # the examples that stand in this pack
    paths: tuple[tuple[int, ...], ...]  # for each of them, its segments from the root on
    predictions: np.ndarray  # int64 [L]: for each learnt token of each example in turn, its place among the N
    learnt_of: np.ndarray  # int64 [examples]: how many of these each example has

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_learnt(self) -> int:
        """Learnt tokens of all examples in the pack, shared ones counted once for each example."""
        return round(float(self.weights.sum()))

    def tokens_of(self, place: int) -> np.ndarray:
        """Return where in the pack the tokens of ``examples[place]`` stand, in their order; int64 [T_example]."""
        segments = [self.segments[index] for index in self.paths[place]]
        return np.concatenate([np.arange(segment.start, segment.stop) for segment in segments])


def pack_examples(
    dataset: Sequence[TokenizedExample],
    indices: Sequence[int],
    *,
    max_tokens: int,
    max_examples: int | None = None,
    num_processes: int = 1,
    together: int = 1,
    share_prefixes: bool = True,
    min_prefix_tokens: int = 8,
    cost: PackCost = PackCost(),  # noqa: B008 (frozen)
) -> list[Pack]:
    """Return packs of at most ``max_tokens`` tokens that hold ``dataset[i]`` for i in ``indices``, none split.

    An example that alone is longer than ``max_tokens`` gets a pack of its own. As few packs as the order
    allows are made, then their costs are evened out: the largest decides the memory, and with several processes
    the time: these get a multiple of ``num_processes`` packs where there are examples for it.

    ``together``: each run of so many ``indices`` (2: a pair) stands in one pack, and is split as one example is.

    A prefix shorter than ``min_prefix_tokens`` is repeated: a segment of its own would cost more than it saves.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    numbered = [(index, dataset[index]) for index in indices]
    if share_prefixes:
        numbered = _sorted_in_runs(numbered, together)
    inputs = [example.input_ids[:-1] for _, example in numbered]
    shared = _shared_with_previous(inputs) if share_prefixes else np.zeros(len(inputs), np.int64)
    lengths = np.array([len(ids) for ids in inputs], np.int64)
    num_learnt = np.array([(example.labels[1:] != IGNORE_INDEX).sum() for _, example in numbered], np.int64)
    # A branch begins at most min_prefix_tokens - 1 tokens before the place where two examples part.
    saved = np.maximum(shared - (min_prefix_tokens - 1), 0)
    alone = cost.in_tokens(np.zeros_like(lengths), lengths, num_learnt)
    after = cost.in_tokens(saved, lengths, num_learnt)  # behind the one before it in the same pack
    added = lengths - saved
    if together > 1:  # from here on a run is what an example is
        first, rest = slice(None, None, together), np.arange(len(lengths)) % together > 0
        lengths = np.add.reduceat(np.where(rest, added, lengths), np.arange(len(lengths))[first])
        alone = np.add.reduceat(np.where(rest, after, alone), np.arange(len(alone))[first])
        added, after = added.reshape(-1, together).sum(axis=1), after.reshape(-1, together).sum(axis=1)
    packs = []
    cuts = _split_evenly(lengths, added, alone, after, max_tokens, max_examples, num_processes)
    for low, high in cuts:
        chosen = numbered[low * together : high * together]
        if share_prefixes and together > 1:  # runs side by side share more when their examples are mixed
            chosen = _sorted_in_runs(chosen, 1)
            prefixes = _shared_with_previous([example.input_ids[:-1] for _, example in chosen])
        else:
            prefixes = np.concatenate([[0], shared[low + 1 : high]])
        packs.append(_lay_out(chosen, prefixes, min_prefix_tokens if share_prefixes else None))
    return packs


def count_tokens(examples: Sequence[TokenizedExample], *, min_prefix_tokens: int = 8) -> tuple[int, int]:
    """Return the tokens of ``examples`` in one pack without and with shared prefixes, without laying it out."""
    inputs = [example.input_ids[:-1] for example in sorted(examples, key=_sort_key)]
    branches, _ = _branch(inputs, _shared_with_previous(inputs), min_prefix_tokens)
    return sum(len(ids) for ids in inputs), sum(branch.end - branch.begin for branch in branches)


@dataclass(frozen=True, slots=True)
class _Branch:
    """Tokens ``begin`` to ``end`` of the input at ``place`` (and of those that share them) below ``parent``."""

    place: int
    begin: int
    end: int
    parent: int


def _branch(
    inputs: list[np.ndarray], shared: np.ndarray, min_prefix_tokens: int | None
) -> tuple[list[_Branch], list[tuple[int, ...]]]:
    """Return the branches of the trie over sorted ``inputs``, and for each input its branches from the root on.

    ``shared`` says how many leading tokens each input has in common with the one before it.
    None for ``min_prefix_tokens``: nothing is shared, in whatever order the inputs are.
    """
    branches: list[_Branch] = []
    paths: list[tuple[int, ...]] = [()] * len(inputs)

    def add(place: int, begin: int, end: int, path: tuple[int, ...]) -> tuple[int, ...]:
        if begin == end:  # the whole input is a prefix of its siblings
            return path
        branches.append(_Branch(place, begin, end, path[-1] if path else -1))
        return (*path, len(branches) - 1)

    # Each entry: places low to high, which share `depth` tokens that stand on `path` already.
    pending: list[tuple[int, int, int, tuple[int, ...]]] = [(0, len(inputs), 0, ())]
    while pending:
        low, high, depth, path = pending.pop()
        start = low
        for place in range(low + 1, high + 1):
            if place < high and min_prefix_tokens is not None and shared[place] >= depth + min_prefix_tokens:
                continue
            if place - start == 1:
                paths[start] = add(start, depth, len(inputs[start]), path)
            else:
                common = int(shared[start + 1 : place].min())
                pending.append((start, place, common, add(start, depth, common, path)))
            start = place
    return branches, paths


def _sort_key(example: TokenizedExample) -> bytes:
    """Bytes that sort as the tokens do, so that examples with a common prefix become neighbours."""
    return example.input_ids[:-1].astype(">i4").tobytes()


def _sorted_in_runs(
    numbered: list[tuple[int, TokenizedExample]], together: int
) -> list[tuple[int, TokenizedExample]]:
    """Return the numbered examples sorted by tokens: in each run of ``together``, and the runs by their first."""
    keyed = [(_sort_key(example), number, example) for number, example in numbered]
    runs = [
        sorted(keyed[low : low + together], key=lambda k: k[:2]) for low in range(0, len(keyed), together)
    ]
    runs.sort(key=lambda run: run[0][:2])
    return [(number, example) for run in runs for _, number, example in run]


def _shared_with_previous(inputs: list[np.ndarray]) -> np.ndarray:
    """Return how many leading tokens each of ``inputs`` shares with the one before it; the first shares none."""
    shared = np.zeros(len(inputs), np.int64)
    for place in range(1, len(inputs)):
        shared[place] = _common_length(inputs[place - 1], inputs[place])
    return shared


def _common_length(left: np.ndarray, right: np.ndarray) -> int:
    size = min(len(left), len(right))
    differs = left[:size] != right[:size]
    first = int(differs.argmax()) if size else 0
    return first if size and differs[first] else size


def _split_evenly(
    lengths: np.ndarray,
    added: np.ndarray,
    alone: np.ndarray,
    after: np.ndarray,
    max_tokens: int,
    max_examples: int | None,
    num_processes: int,
) -> list[tuple[int, int]]:
    """Cut the sequence of places into runs (low, high) whose distinct tokens fit ``max_tokens``.

    An example has ``lengths`` tokens and costs ``alone`` at the head of a run; behind another it adds ``added``
    tokens and costs ``after``. Filling each run to the brim gives the fewest runs, with a small last one. The
    smallest limit of cost that still gives as few is found by bisection: 900, 900, 200 become about 700, 700, 600.
    With several processes as few means the next multiple of their number.
    """
    sizes = list(zip(lengths.tolist(), added.tolist(), alone.tolist(), after.tolist(), strict=True))

    def fill(limit: int) -> list[tuple[int, int]]:
        starts: list[int] = []
        tokens = spent = 0
        for place, (length, more, first, next_) in enumerate(sizes):
            full = bool(starts) and max_examples is not None and place - starts[-1] >= max_examples
            if not starts or full or tokens + more > max_tokens or spent + next_ > limit:
                starts.append(place)
                tokens, spent = length, first
            else:
                tokens, spent = tokens + more, spent + next_
        return list(zip(starts, [*starts[1:], len(sizes)], strict=True))

    high = int(alone.sum())
    fewest = min(math.ceil(len(fill(high)) / num_processes) * num_processes, len(sizes))
    low = 1 if fewest > 1 else high
    while low < high:
        middle = (low + high) // 2
        if len(fill(middle)) <= fewest:
            high = middle
        else:
            low = middle + 1
    return fill(high)


def _lay_out(
    examples: list[tuple[int, TokenizedExample]], shared: np.ndarray, min_prefix_tokens: int | None
) -> Pack:
    """Lay the numbered examples of one pack out; they are sorted by tokens where prefixes are shared."""
    inputs = [example.input_ids[:-1] for _, example in examples]
    branches, paths = _branch(inputs, shared, min_prefix_tokens)
    segments: list[Segment] = []
    for branch in branches:
        start = segments[-1].stop if segments else 0
        segments.append(Segment(start, start + branch.end - branch.begin, branch.parent))

    predictions = []  # (logit position, target) in one number
    for path, (_, example) in zip(paths, examples, strict=True):
        spans = [np.arange(segments[index].start, segments[index].stop) for index in path]
        positions = spans[0] if len(spans) == 1 else np.concatenate(spans)
        labels = example.labels[1:].astype(np.int64)
        learnt = labels != IGNORE_INDEX
        predictions.append(positions[learnt] << 32 | labels[learnt])
    # Examples that ask for the same prediction share it, with a weight.
    distinct, places, counts = np.unique(np.concatenate(predictions), return_inverse=True, return_counts=True)
    return Pack(
        input_ids=np.concatenate([inputs[b.place][b.begin : b.end] for b in branches]).astype(np.int64),
        position_ids=np.concatenate([np.arange(b.begin, b.end) for b in branches]),
        owners=np.repeat([examples[b.place][0] for b in branches], [b.end - b.begin for b in branches]),
        segments=tuple(segments),
        logit_positions=distinct >> 32,
        targets=distinct & 0xFFFFFFFF,
        weights=counts.astype(np.float32),
        examples=tuple(number for number, _ in examples),
        paths=tuple(paths),
        predictions=places,
        learnt_of=np.array([len(part) for part in predictions], np.int64),
    )
