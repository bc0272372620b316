"""Will it fit, and how long will it take: measured on this machine, computed for another.

Computed means: the run's heaviest pack is rehearsed without weights (rehearsal.py), and what the step's parts
take is added up. On a GPU the CUDA context and the allocator's waste are assumptions, named below.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lorasmith.data.tokens import TokenizedExample, num_rows
from lorasmith.engine.forward import PackForward
from lorasmith.engine.settings import EngineSettings
from lorasmith.model.gpus import Gpu
from lorasmith.model.memory import free_bytes
from lorasmith.model.methods import count_frozen
from lorasmith.packing.plan import Gain
from lorasmith.training.fit import Fit, bytes_of_training, fit_computed
from lorasmith.training.rehearsal import Rehearsal
from lorasmith.training.settings import ObjectiveSettings, TrainingSettings

_CUDA_CONTEXT = round(0.8 * 2**30)  # assumed: context, kernels, cuBLAS workspace
_SHARE_OF_PEAK_RATE = (0.25, 0.5)  # assumed: what a step reaches of a GPU's peak rate, small and large models
SECONDS_TO_START_AN_OPERATION = 8e-6  # assumed: eager PyTorch's own work for a kernel, however small
_BYTES_OF_A_TOKEN_ON_DISK = 4
# Of a step's time: backwards through a frozen base takes about as long as forwards.
_SHARE_WITHOUT_GRADIENT = 0.5


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run takes in one place. ``how`` says whether it is measured or computed.

    ``is_bound_by_starts``: a GPU computes its small operations faster than they can be started, so a faster one
    would be no faster.
    """

    place: str
    how: str
    fit: Fit | None  # None: it does not fit
    parts: dict[str, int]  # bytes at the peak, by what they are for
    memory_bytes: int  # that can be used there
    num_steps: int
    num_tokens: int  # that the run computes
    num_asked: int  # that go through without gradient: the reference, and what KTO asks in each step
    seconds: tuple[float, float] | None  # of all steps, at least and at most; None: it does not fit
    is_bound_by_starts: bool = False
    is_sharded: bool = False  # seconds are then without the traffic of the base's layers
    takes_whole: bool = True  # base and adapter fit one GPU, as asking loads them after a sharded training
    shares_prefixes: bool = True  # num_tokens counts a shared prefix once

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "place": self.place,
            "how": self.how,
            "fits": self.fit is not None,
            "micro_batch_tokens": self.fit and self.fit.micro_batch_tokens,
            "gradient_checkpointing": self.fit and self.fit.gradient_checkpointing,
            "largest_pack_tokens": self.fit and self.fit.largest_pack_tokens,
            "peak_bytes": self.peak_bytes,
            "parts": self.parts,
            "memory_bytes": self.memory_bytes,
            "num_steps": self.num_steps,
            "num_tokens": self.num_tokens,
            "num_asked": self.num_asked,
            "seconds_per_step": self.seconds and [s / self.num_steps for s in self.seconds],
            "seconds": self.seconds and list(self.seconds),
            "is_bound_by_starts": self.is_bound_by_starts,
            "is_sharded": self.is_sharded,
        }


def estimate_here(
    model: PeftModel | PreTrainedModel,
    forward: PackForward,
    dataset: Sequence[TokenizedExample],
    training: TrainingSettings,
    objective: ObjectiveSettings,
    gain: Gain,
    fit: Fit,
) -> Estimate:
    """Return what a run takes on this machine, from the measurement in ``fit``."""
    weights = _bytes_of_weights(model)
    activations = round(fit.bytes_per_token * fit.largest_pack_tokens)
    training_bytes = bytes_of_training(model)
    num_tokens = tokens_to_compute(gain, num_rows(dataset), training, forward)
    num_asked = tokens_to_ask(gain, num_rows(dataset), training, objective, forward)
    seconds = in_steps(num_tokens, num_asked) * fit.seconds_per_token
    return Estimate(
        place="this machine's " + ("CPU" if forward.device.type == "cpu" else "GPU"),
        how=fit.reason,
        fit=fit,
        parts={
            "weights of base and adapter": weights,
            "gradients and optimizer": training_bytes,
            "activations and logits": activations,
            "Python and libraries": max(0, fit.peak_bytes - weights - training_bytes - activations),
        },
        memory_bytes=free_bytes(forward.device) + fit.peak_bytes - training_bytes - activations,
        num_steps=training.num_steps(num_rows(dataset)),
        num_tokens=num_tokens,
        num_asked=num_asked,
        seconds=(seconds, seconds),
        shares_prefixes=forward.share_prefixes,
    )


def estimate_on(
    gpu: Gpu,
    count: int,
    rehearsal: Rehearsal,
    dataset: Sequence[TokenizedExample],
    training: TrainingSettings,
    objective: ObjectiveSettings,
    gain: Gain,
    engine: EngineSettings,
    dtype: str,
) -> Estimate:
    """Return what a run would take on ``count`` GPUs of a kind; ``rehearsal`` is of the model in ``dtype``.

    Each of several GPUs takes its share of every step's examples and holds the whole model. With ``engine.shard_base``
    it holds its part of the layers; nothing is measured before such a run, so its packs are as large as they are set.
    """
    is_sharded = engine.shard_base and count > 1
    checkpointing = engine.gradient_checkpointing
    weights = rehearsal.weight_bytes_of_share(count) if is_sharded else rehearsal.weight_bytes
    training_bytes = bytes_of_training(rehearsal.model)
    room = gpu.memory_bytes - _CUDA_CONTEXT - weights - training_bytes
    one_gpu = training.model_copy(update={"batch_size": -(-training.batch_size // count)})
    fit, activations, pack = fit_computed(
        rehearsal,
        dataset,
        one_gpu,
        checkpointing is not False if is_sharded else checkpointing,
        torch.device("cuda"),
        room,
        may_shrink=not is_sharded,
    )
    num_tokens = tokens_to_compute(gain, num_rows(dataset), training, rehearsal.forward)
    num_asked = tokens_to_ask(gain, num_rows(dataset), training, objective, rehearsal.forward)
    in_all = in_steps(num_tokens, num_asked)
    num_steps = training.num_steps(num_rows(dataset))
    seconds, is_bound_by_starts = None, False
    if fit is not None:
        products = in_all / count * pack.flops / fit.largest_pack_tokens
        num_packs = in_all / num_tokens * max(num_steps, num_tokens / count / fit.largest_pack_tokens)
        starts = num_packs * pack.num_operations * SECONDS_TO_START_AN_OPERATION
        least, most = (
            max(starts, products / (gpu.peak_flops(dtype) * share)) for share in reversed(_SHARE_OF_PEAK_RATE)
        )
        seconds, is_bound_by_starts = (least, most), most == starts
    return Estimate(
        place=gpu.name if count == 1 else f"{count} x {gpu.name}",
        how="computed, not measured",
        fit=fit,
        parts={
            "weights of base and adapter": weights,
            "gradients and optimizer": training_bytes,
            "activations and logits": activations,
            "CUDA context (assumed)": _CUDA_CONTEXT,
        },
        memory_bytes=gpu.memory_bytes,
        num_steps=num_steps,
        num_tokens=num_tokens,
        num_asked=num_asked,
        seconds=seconds,
        is_bound_by_starts=is_bound_by_starts,
        is_sharded=is_sharded,
        takes_whole=rehearsal.weight_bytes + _CUDA_CONTEXT <= gpu.memory_bytes,
        shares_prefixes=rehearsal.forward.share_prefixes,
    )


def disk_needed(
    model: PeftModel | PreTrainedModel,
    dataset: Sequence[TokenizedExample],
    training: TrainingSettings,
    *,
    validates: bool,
) -> dict[str, int]:
    """Return the bytes that a run and its merge write, by what they are."""
    adapter = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    # Held in 8 or 4 bits or not: a merge writes the unquantised weights.
    base = count_frozen(model) * cast(torch.dtype, model.config.dtype).itemsize
    kept = training.keep_checkpoints + validates + 1  # a new one is whole before an old one goes
    num_tokens = sum(len(example.input_ids) for example in dataset)
    return {
        "adapter": adapter,
        f"checkpoints (up to {kept})": kept * 3 * adapter,
        "cache of tokens": _BYTES_OF_A_TOKEN_ON_DISK * num_tokens,
        "merged model": base,
    }


def tokens_to_compute(gain: Gain, num_examples: int, training: TrainingSettings, forward: PackForward) -> int:
    """Return the tokens that the whole run computes, in the way of ``forward``: shared, packed or padded."""
    epochs = training.num_steps(num_examples) / training.steps_per_epoch(num_examples)
    return round(_tokens_of_an_epoch(gain, forward) * epochs)


def tokens_to_ask(
    gain: Gain,
    num_examples: int,
    training: TrainingSettings,
    objective: ObjectiveSettings,
    forward: PackForward,
    *,
    has_reference: bool = False,
) -> int:
    """Return the tokens that go through without gradient: those of the reference once, and KTO's of every step."""
    epochs = training.num_steps(num_examples) / training.steps_per_epoch(num_examples)
    times = objective.passes_a_step * epochs + (objective.needs_reference and not has_reference)
    return round(_tokens_of_an_epoch(gain, forward) * times)


def in_steps(num_tokens: int, num_asked: int) -> float:
    """Return how many tokens of steps take as long as these and those that go through without gradient."""
    return num_tokens + _SHARE_WITHOUT_GRADIENT * num_asked


def in_words(seconds: float) -> str:
    """Return a time to the two places that matter: 40 s, 19 min, 2 h 5 min, 3 d 4 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


def _tokens_of_an_epoch(gain: Gain, forward: PackForward) -> int:
    return gain.padded if not forward.packed else gain.shared if forward.share_prefixes else gain.packed


def _bytes_of_weights(model: PeftModel | PreTrainedModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())
