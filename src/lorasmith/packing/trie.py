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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorasmith.data.tokens import IGNORE_INDEX, TokenizedExample


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
    share_prefixes: bool = True,
    min_prefix_tokens: int = 8,
) -> list[Pack]:
    """Return packs of at most ``max_tokens`` tokens that hold ``dataset[i]`` for i in ``indices``, none split.

    An example that alone is longer than ``max_tokens`` gets a pack of its own. As few packs as the order
    allows are made, then their sizes are evened out, since the longest decides the memory.

    A prefix shorter than ``min_prefix_tokens`` is repeated: a segment of its own would cost more than it saves.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    examples = [dataset[index] for index in indices]
    order = list(range(len(examples)))
    shared = np.zeros(len(examples), np.int64)
    if share_prefixes:
        order.sort(key=lambda place: _sort_key(examples[place]))
        shared = _shared_with_previous([examples[place].input_ids[:-1] for place in order])
        # A branch begins at most min_prefix_tokens - 1 tokens before the place where two examples part.
        shared = np.maximum(shared - (min_prefix_tokens - 1), 0)
    lengths = np.array([len(examples[place].input_ids) - 1 for place in order], np.int64)
    packs = []
    for run in _split_evenly(lengths, shared, max_tokens, max_examples):
        members = [order[place] for place in run]
        named = [(indices[member], examples[member]) for member in members]
        packs.append(_lay_out(named, min_prefix_tokens if share_prefixes else None))
    return packs


def count_tokens(examples: Sequence[TokenizedExample], *, min_prefix_tokens: int = 8) -> tuple[int, int]:
    """Return the tokens of ``examples`` in one pack without and with shared prefixes, without laying it out."""
    inputs = [example.input_ids[:-1] for example in sorted(examples, key=_sort_key)]
    branches, _ = _branch(inputs, min_prefix_tokens)
    return sum(len(ids) for ids in inputs), sum(branch.end - branch.begin for branch in branches)


@dataclass(frozen=True, slots=True)
class _Branch:
    """Tokens ``begin`` to ``end`` of the input at ``place`` (and of those that share them) below ``parent``."""

    place: int
    begin: int
    end: int
    parent: int


def _branch(
    inputs: list[np.ndarray], min_prefix_tokens: int | None
) -> tuple[list[_Branch], list[tuple[int, ...]]]:
    """Return the branches of the trie over sorted ``inputs``, and for each input its branches from the root on.

    None for ``min_prefix_tokens``: nothing is shared, in whatever order the inputs are.
    """
    shared = _shared_with_previous(inputs)
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
    lengths: np.ndarray, shared: np.ndarray, max_tokens: int, max_examples: int | None
) -> list[list[int]]:
    """Cut the sequence of places into runs whose distinct tokens fit ``max_tokens``.

    Filling each run to the brim gives the fewest runs, with a small last one. The smallest limit that still
    gives as few is found by bisection: 3 runs of 900, 900, 200 tokens become about 700, 700, 600.
    """

    def fill(limit: int) -> list[list[int]]:
        runs: list[list[int]] = []
        used = 0
        for place, length in enumerate(lengths.tolist()):
            added = length - int(shared[place])
            full = bool(runs) and max_examples is not None and len(runs[-1]) >= max_examples
            if not runs or full or used + added > limit:
                runs.append([place])
                used = length
            else:
                runs[-1].append(place)
                used += added
        return runs

    fewest = fill(max_tokens)
    low, high = 1, max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(fill(middle)) <= len(fewest):
            high = middle
        else:
            low = middle + 1
    return fill(high)


def _lay_out(examples: list[tuple[int, TokenizedExample]], min_prefix_tokens: int | None) -> Pack:
    """Lay the numbered examples of one pack out; they are sorted by tokens where prefixes are shared."""
    inputs = [example.input_ids[:-1] for _, example in examples]
    branches, paths = _branch(inputs, min_prefix_tokens)
    segments: list[Segment] = []
    for branch in branches:
        start = segments[-1].stop if segments else 0
        segments.append(Segment(start, start + branch.end - branch.begin, branch.parent))

    weights: dict[tuple[int, int], int] = {}  # (logit position, target) -> the examples that ask for it
    for place, (_, example) in enumerate(examples):
        path = np.concatenate(
            [np.arange(segments[index].start, segments[index].stop) for index in paths[place]]
        )
        labels = example.labels[1:]
        learnt = labels != IGNORE_INDEX
        for prediction in zip(path[learnt].tolist(), labels[learnt].tolist(), strict=True):
            weights[prediction] = weights.get(prediction, 0) + 1
    return Pack(
        input_ids=np.concatenate([inputs[b.place][b.begin : b.end] for b in branches]).astype(np.int64),
        position_ids=np.concatenate([np.arange(b.begin, b.end) for b in branches]),
        owners=np.repeat([examples[b.place][0] for b in branches], [b.end - b.begin for b in branches]),
        segments=tuple(segments),
        logit_positions=np.array([position for position, _ in weights], np.int64),
        targets=np.array([target for _, target in weights], np.int64),
        weights=np.array(list(weights.values()), np.float32),
        examples=tuple(number for number, _ in examples),
        paths=tuple(paths),
    )
