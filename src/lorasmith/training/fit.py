"""Cut the steps so that they fit into memory: how many tokens a pack may have, and whether activations are kept.

    rungs, best first:   M tokens, M/2, M/4 ... the longest example, all with activations kept
                         then the same with activations recomputed (a third more time)

The first rung that fits is taken. What a rung needs is computed on the meta device (rehearsal.py) for the
heaviest pack of the data, then corrected by a real pass, forward and backward, over that pack or, where the run
is too short to earn that back, over a smaller one. Nothing of it remains: no gradient, no changed weight, no
random number.

The cut never changes the result but for rounding, and the rounding is kept too: run.json holds the choice.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import psutil
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lorasmith.data.tokens import TokenizedExample, examples_per_row, num_rows
from lorasmith.engine.forward import PackForward
from lorasmith.errors import TrainingError
from lorasmith.model.memory import (
    Peak,
    free_bytes,
    give_back_freed_memory,
    in_gib,
    is_out_of_memory,
    measure_peak,
)
from lorasmith.packing.trie import Pack, pack_examples
from lorasmith.training.rehearsal import Rehearsal, Rehearsed
from lorasmith.training.schedule import order_steps
from lorasmith.training.settings import TrainingSettings

# Larger packs are no faster: a CPU's products are at their speed by then, a GPU's too.
MOST_TOKENS = {"cpu": 2048, "mps": 2048, "cuda": 16384}
_SAFE_SHARE = 0.9  # of the free memory: other programs live too
_SHARE_FOR_MEASURING = 0.03  # of the run's tokens
_CLEARLY_FASTER = 1.05
# Bytes taken for each byte that lives at once, with activations kept and recomputed. CPU: measured with SmolLM2-135M
# at 119 to 476 tokens (docs/results.md): glibc 2.36 cannot use a freed aligned block for another of the same size, and
# what is recomputed frees the most. CUDA and MPS: assumed.
_WASTE = {"cpu": (1.5, 4.0), "mps": (1.3, 1.3), "cuda": (1.15, 1.15)}
_STEPS_LOOKED_AT = 64
_PAIRS_LIKE_A_TOKEN = 700  # attention pairs that take about the memory of one token in Llamas of 0.1 to 7 B


@dataclass(frozen=True, slots=True)
class Fit:
    """How the steps of a run are cut, and what is known of their cost."""

    micro_batch_tokens: int
    gradient_checkpointing: bool
    reason: str = "as set"
    largest_pack_tokens: int = 0  # in the data, under this cut
    bytes_per_token: float = 0.0  # of the heaviest pack: activations, without the model
    peak_bytes: int = 0  # of the process on the device, with gradients and optimizer
    measured_tokens: int = 0  # of the pack that was measured; 0: nothing was
    seconds_per_token: float = 0.0  # measured; 0: nothing was

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Fit":
        return cls(**fields)

    @classmethod
    def unmeasured(cls, training: TrainingSettings, checkpointing: bool | str, device: torch.device) -> "Fit":
        """Return what the settings say, with the device's usual pack size for "auto"."""
        tokens = training.micro_batch_tokens
        return cls(MOST_TOKENS[device.type] if tokens == "auto" else tokens, checkpointing is True)

    def after_out_of_memory(self, largest: int, longest: int, may_checkpoint: bool) -> "Fit | None":
        """Return the next smaller setting when a pack of ``largest`` tokens was too much, or None if there is none."""
        half = max(longest, min(largest, self.micro_batch_tokens) // 2)
        if half < min(largest, self.micro_batch_tokens):
            return replace(self, micro_batch_tokens=half, largest_pack_tokens=half)
        if may_checkpoint and not self.gradient_checkpointing:
            return replace(self, gradient_checkpointing=True, bytes_per_token=0.0)
        return None

    def __str__(self) -> str:
        kept = "recomputed (checkpointing)" if self.gradient_checkpointing else "kept"
        return f"at most {self.micro_batch_tokens:,} tokens a pack, activations {kept}"


def choose_fit(
    model: PeftModel | PreTrainedModel,
    forward: PackForward,
    rehearsal: Rehearsal,
    dataset: Sequence[TokenizedExample],
    training: TrainingSettings,
    checkpointing: bool | str,
    *,
    must_measure: bool = False,
    num_sharing: int = 1,
) -> Fit:
    """Return the best cut that fits into the memory that is free now; ``model`` and the random stream are unchanged.

    ``must_measure``: measure the heaviest pack whatever it costs, for an estimate. ``num_sharing``: how many processes
    of the run share the memory of a machine without GPUs.

    Raises:
        TrainingError: not even the longest example alone fits; names it and the ways out.
    """
    device = forward.device
    _page_in(model)
    chooser = _Chooser(dataset, training, rehearsal, device)
    fixed = bytes_of_training(model)
    room = _SAFE_SHARE * free_bytes(device) / (num_sharing if device.type == "cpu" else 1) - fixed
    rungs = list(_rungs(chooser.most_tokens, longest_input(dataset), checkpointing, forward.can_checkpoint))
    rung = next((rung for rung in rungs if chooser.bytes_of(*rung) <= room), None)
    if rung is None:
        raise TrainingError(does_not_fit(dataset, room, chooser.bytes_of(*rungs[-1])))
    tokens, recompute = rung
    budget = math.inf if must_measure else _SHARE_FOR_MEASURING * run_tokens(dataset, training)
    pack = chooser.heaviest(tokens)
    measured = _part_of(pack, dataset, forward, budget)
    if measured is None:
        need = chooser.bytes_of(*rung)
        return Fit(
            tokens,
            recompute,
            "computed, not measured, since the run is short: "
            f"{in_gib(need + fixed)} of {in_gib(room + fixed)} that can be used",
            pack.num_tokens,
            need / pack.num_tokens,
            round(_resident(device) + fixed + need),
        )
    return _measure(model, forward, chooser, rungs, rung, measured, room, fixed)


def _measure(
    model: PeftModel | PreTrainedModel,
    forward: PackForward,
    chooser: "_Chooser",
    rungs: list[tuple[int, bool]],
    rung: tuple[int, bool],
    pack: Pack,
    room: float,
    fixed: int,
) -> Fit:
    """Correct what was computed by a real pass over ``pack``, and choose again if the rung was too high."""
    while True:
        tokens, recompute = rung
        outcome = _try_pack(model, forward, pack, recompute)
        if outcome is not None:
            peak, seconds = outcome
            chooser.correction = peak.taken / chooser.computed(pack, recompute)
            break
        rest = rungs[rungs.index(rung) + 1 :]
        if not rest:
            raise TrainingError(does_not_fit(chooser.dataset, room, chooser.bytes_of(*rung)))
        rung = rest[0]
        pack = chooser.heaviest(rung[0])
    rate, measured = seconds / pack.num_tokens, pack.num_tokens
    chosen = next((r for r in rungs[rungs.index(rung) :] if chooser.bytes_of(*r) <= room), None)
    if chosen is None:
        raise TrainingError(does_not_fit(chooser.dataset, room, chooser.bytes_of(*rungs[-1])))
    tokens, recompute = chosen
    heaviest = chooser.heaviest(tokens)
    half = next((r for r in rungs if r == (tokens // 2, recompute)), None)
    if half is not None and measured == heaviest.num_tokens > half[0]:
        smaller = _try_pack(model, forward, chooser.heaviest(half[0]), recompute)
        if smaller is not None:
            half_rate = smaller[1] / chooser.heaviest(half[0]).num_tokens
            if rate > _CLEARLY_FASTER * half_rate:
                (tokens, recompute), rate, heaviest = half, half_rate, chooser.heaviest(half[0])
    need = chooser.bytes_of(tokens, recompute)
    how = "measured" if measured >= heaviest.num_tokens else f"extrapolated from {measured:,} measured tokens"
    before = round(_resident(forward.device))
    return Fit(
        tokens,
        recompute,
        f"{how} by {peak.how}: {in_gib(need + fixed)} of {in_gib(room + fixed)} that can be used",
        heaviest.num_tokens,
        need / heaviest.num_tokens,
        round(before + fixed + need),
        measured,
        rate,
    )


@dataclass
class _Chooser:
    """What each rung would need."""

    dataset: Sequence[TokenizedExample]
    training: TrainingSettings
    rehearsal: Rehearsal
    device: torch.device
    correction: float = 1.0  # measured bytes for each computed one

    def __post_init__(self) -> None:
        self._heaviest: dict[int, Pack] = {}

    @property
    def most_tokens(self) -> int:
        wanted = self.training.micro_batch_tokens
        return MOST_TOKENS[self.device.type] if wanted == "auto" else wanted

    def heaviest(self, tokens: int) -> Pack:
        if tokens not in self._heaviest:
            self._heaviest[tokens] = heaviest_pack(
                self.dataset, self.training, tokens, self.rehearsal.forward
            )
        return self._heaviest[tokens]

    def bytes_of(self, tokens: int, recompute: bool) -> float:
        return self.correction * self.computed(self.heaviest(tokens), recompute)

    def computed(self, pack: Pack, recompute: bool) -> float:
        rehearsed = self.rehearsal.of(pack, checkpointing=recompute)
        return _WASTE[self.device.type][recompute] * rehearsed.peak_bytes


def fit_computed(
    rehearsal: Rehearsal,
    dataset: Sequence[TokenizedExample],
    training: TrainingSettings,
    checkpointing: bool | str,
    device: torch.device,
    room: int,
    *,
    may_shrink: bool = True,
) -> tuple[Fit | None, int, Rehearsed]:
    """Return the cut for a ``device`` with ``room`` bytes for a pack, its bytes, and its heaviest pack's rehearsal.

    None for the cut: not even the longest example alone fits, or, where packs may not shrink, not the largest; the rest
    then tells what that would take.
    """
    chooser = _Chooser(dataset, training, rehearsal, device)
    can = rehearsal.forward.can_checkpoint
    rungs = list(_rungs(chooser.most_tokens, longest_input(dataset), checkpointing, can))
    if not may_shrink:
        rungs = rungs[:1]
    rung = next((rung for rung in rungs if chooser.bytes_of(*rung) <= room), None)
    tokens, recompute = rung or rungs[-1]
    pack, need = chooser.heaviest(tokens), round(chooser.bytes_of(tokens, recompute))
    rehearsed = rehearsal.of(pack, checkpointing=recompute)
    if rung is None:
        return None, need, rehearsed
    return Fit(tokens, recompute, "computed", pack.num_tokens, need / pack.num_tokens), need, rehearsed


def has_room_for(pack: Pack, fit: Fit, device: torch.device, num_sharing: int = 1) -> bool:
    """Whether ``pack`` can be computed on a CPU without being killed for it; true where allocators refuse politely.

    The system hands out memory that it does not have and ends the process when it is touched, so what a pack of
    this size takes is compared with what is free, and with what earlier steps left to reuse. ``num_sharing``
    processes on the machine compute a pack each at this moment.
    """
    if device.type != "cpu" or not fit.bytes_per_token:
        return True
    need = fit.bytes_per_token * pack.num_tokens * num_sharing
    if need <= free_bytes(device):
        return True
    give_back_freed_memory()
    return need <= free_bytes(device)


def _rungs(
    most: int, longest: int, checkpointing: bool | str, can_checkpoint: bool
) -> Iterator[tuple[int, bool]]:
    sizes = [most]
    while sizes[-1] > longest:
        sizes.append(max(longest, sizes[-1] // 2))
    if checkpointing is not True:
        yield from ((size, False) for size in sizes)
    if checkpointing is True or (checkpointing == "auto" and can_checkpoint):
        yield from ((size, True) for size in sizes)


def heaviest_pack(
    dataset: Sequence[TokenizedExample],
    training: TrainingSettings,
    max_tokens: int,
    forward: PackForward,
) -> Pack:
    """Return the pack of at most ``max_tokens`` tokens that takes the most memory.

    Looked at: a step of the longest examples, larger than any of the run if it is one pack, and the largest steps
    of the first epoch, whose shared prefixes make other shapes.
    """
    lengths, per_row = example_lengths(dataset), examples_per_row(dataset)
    of_rows = lengths.reshape(-1, per_row).sum(axis=1)
    size = min(training.batch_size, len(of_rows))
    rows = np.argpartition(of_rows, -size)[-size:]
    longest = (rows[:, None] * per_row + np.arange(per_row)).flatten().tolist()
    per_epoch = training.steps_per_epoch(len(of_rows))
    order = order_steps(dataset, training)
    steps = [order.examples_of(step) for step in range(min(per_epoch, 1000))]
    steps.sort(key=lambda step: int(lengths[step].sum()), reverse=True)
    packs = [
        pack
        for step in [longest, *steps[:_STEPS_LOOKED_AT]]
        for pack in pack_examples(
            dataset,
            step,
            max_tokens=max_tokens,
            max_examples=training.micro_batch_size,
            together=per_row,
            share_prefixes=forward.share_prefixes,
            cost=forward.cost,
        )
    ]
    return max(packs, key=_weight)


def _weight(pack: Pack) -> float:
    """Return about how much memory a pack takes, in tokens: its tokens, and the pairs that attention sees."""
    visible: list[int] = []
    pairs = 0
    for segment in pack.segments:
        own = segment.stop - segment.start
        visible.append(own + (visible[segment.parent] if segment.parent >= 0 else 0))
        pairs += own * visible[-1]
    return pack.num_tokens + pairs / _PAIRS_LIKE_A_TOKEN


def example_lengths(dataset: Sequence[TokenizedExample]) -> np.ndarray:
    """Return the tokens of each example, without reading them where the data set knows."""
    known = getattr(dataset, "lengths", None)
    return known if known is not None else np.array([len(e.input_ids) for e in dataset], np.int64)


def longest_input(dataset: Sequence[TokenizedExample]) -> int:
    """Return the tokens that the longest row computes: all but the last of each example, nothing shared."""
    per_row = examples_per_row(dataset)
    return int((example_lengths(dataset) - 1).reshape(-1, per_row).sum(axis=1).max())


def run_tokens(dataset: Sequence[TokenizedExample], training: TrainingSettings) -> int:
    """Return about how many tokens the whole run computes, shared prefixes counted for each example."""
    steps, per_epoch = training.num_steps(num_rows(dataset)), training.steps_per_epoch(num_rows(dataset))
    return round(float(example_lengths(dataset).sum()) * steps / per_epoch)


def _part_of(
    pack: Pack, dataset: Sequence[TokenizedExample], forward: PackForward, budget: float
) -> Pack | None:
    """Return ``pack``, or the largest part of it that two passes over stay in ``budget`` tokens, or None."""
    if 2 * pack.num_tokens <= budget:
        return pack
    examples, used = [], 0
    for example in pack.examples:
        used += len(dataset[example].input_ids)
        if 2 * used > budget:
            break
        examples.append(example)
    if not examples:
        return None
    return pack_examples(
        dataset, examples, max_tokens=used, share_prefixes=forward.share_prefixes, cost=forward.cost
    )[0]


def _try_pack(
    model: PeftModel | PreTrainedModel, forward: PackForward, pack: Pack, recompute: bool
) -> tuple[Peak, float] | None:
    """Return peak memory and seconds of two passes over ``pack``, the second; None if memory ran out.

    The first pass brings the weights in from their file and builds kernels.
    """
    device, was_training, before = forward.device, model.training, forward.checkpointing
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    devices = [device] if device.type == "cuda" else []
    forward.set_checkpointing(recompute)
    try:
        with torch.random.fork_rng(devices=devices):
            model.train()
            outcome = None
            for _ in range(2):
                for parameter in trained:
                    parameter.grad = None
                with measure_peak(device) as peak:
                    started = time.perf_counter()
                    forward.summed_loss(pack, "train").backward()
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                    outcome = peak, time.perf_counter() - started
            return outcome
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        for parameter in trained:
            parameter.grad = None
        forward.set_checkpointing(before)
        model.train(was_training)
        give_back_freed_memory()


def bytes_of_training(model: PeftModel | PreTrainedModel) -> int:
    """Return what the adapter's gradients and AdamW's two moments take, none of which is there before a step."""
    return sum(3 * 4 * p.numel() for p in model.parameters() if p.requires_grad)


def _page_in(model: PeftModel | PreTrainedModel) -> None:
    """Touch every page of weights that are mapped from their file: the first step would, and they count."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.detach().flatten()[:: 4096 // parameter.element_size()].sum()


def _resident(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def does_not_fit(dataset: Sequence[TokenizedExample], room: float, need: float | None = None) -> str:
    """Return the error text for a run whose longest example does not fit."""
    index = int(example_lengths(dataset).argmax())
    needed = "" if need is None else f" It needs {in_gib(need)}, and {in_gib(max(0.0, room))} can be used."
    return (
        f"The memory does not hold a step on the longest example alone: {dataset[index].where}, "
        f"{len(dataset[index].input_ids):,} tokens.{needed} Ways out: a smaller data.max_seq_len with "
        "data.overlong=truncate or drop, engine.gradient_checkpointing=true or auto, base.dtype=bfloat16, a smaller "
        "base, or closing other programs. The last checkpoint is kept."
    )
