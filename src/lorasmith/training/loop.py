"""The training loop: packs + model -> adapter, one StepReport a step.

    for step:
        take the step's examples -> packs
        for each pack:  loss = sum over learnt tokens (or pairs) / those of the whole step;  backward
        out of memory: smaller packs, and the step again from its start
        several processes: each has done its share of the packs; sum their gradients
        clip, set the learning rate, AdamW
        validate and save where it is time
        yield StepReport

The mean is over the learnt tokens of the step, so its cut into packs, and which process computes which of them
(distributed.py), changes nothing but memory and time.
"""

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from lorasmith.data.tokens import TokenizedExample, examples_per_row, num_rows
from lorasmith.engine.forward import PackForward
from lorasmith.errors import NonFiniteLossError, ResumeError, TrainingError
from lorasmith.model.memory import free_bytes, give_back_freed_memory, is_out_of_memory
from lorasmith.model.method_settings import MethodSettings
from lorasmith.packing.trie import Pack, pack_examples
from lorasmith.training.checkpoint import (
    Checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from lorasmith.training.distributed import ALONE, Team
from lorasmith.training.fit import Fit, does_not_fit, has_room_for, longest_input
from lorasmith.training.method_steps import after_step, group_parameters, penalty
from lorasmith.training.objective import NEXT_TOKEN, Ask, Objective, ask_packs
from lorasmith.training.schedule import learning_rate_at, order_steps
from lorasmith.training.settings import TrainingSettings

_MOST_OVERFLOWS = 20  # steps in a row that float16 may leave out while its loss scale comes down
# Relative: another machine or thread count rounds differently, other weights differ more.
_PROBE_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step did. Losses are means over learnt tokens or pairs, in nats."""

    step: int  # steps done, from 1
    num_steps: int
    epoch: float
    loss: float  # before this step's update
    learning_rate: float
    grad_norm: float  # before clipping
    num_tokens: int  # computed: shared prefixes counted once
    num_learnt_tokens: int
    seconds: float  # of this step alone, without validation and saving
    validation_loss: float | None = None
    checkpoint: Path | None = None
    memory_note: str | None = None  # what was done when this step ran out of memory
    measured: Mapping[str, float] | None = None  # what else the objective tells, as means
    validation_measured: Mapping[str, float] | None = None  # the same of the validation data

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds


def train(
    model: PeftModel | PreTrainedModel,
    dataset: Sequence[TokenizedExample],
    settings: TrainingSettings,
    *,
    forward: PackForward,
    learning_rate: float,
    run_dir: Path,
    objective: Objective = NEXT_TOKEN,
    fit: Fit | None = None,
    may_checkpoint: bool = True,
    method: MethodSettings | None = None,
    validation: Sequence[TokenizedExample] | None = None,
    resume_from: Checkpoint | None = None,
    record: Callable[[StepReport], None] = lambda report: None,
    record_fit: Callable[[Fit], None] = lambda fit: None,
    should_stop: Callable[[], bool] = lambda: False,
    team: Team = ALONE,
) -> Iterator[StepReport]:
    """Train ``model`` on ``dataset`` and yield a report after each step; checkpoints go to ``run_dir``.

    ``record`` gets each step's report before its checkpoint is written, so that no crash can leave a checkpoint
    of a step that nobody noted. When ``should_stop()`` is true after a step, that step is saved and the loop
    ends early.

    ``fit`` says how steps are cut into packs; none: as ``settings`` say. A step that runs out of memory is done
    again from its start with smaller packs, and at the last (if ``may_checkpoint``) with activations recomputed;
    ``record_fit`` gets the new cut before that.

    Every process of a ``team`` calls this with the same arguments and yields the same reports; only the first one
    reads and writes ``run_dir``.

    Raises:
        LostProcessError: another process of the team is gone. The last checkpoint is kept.
        TrainingError: not even the longest example alone fits. The last checkpoint is kept.
        NonFiniteLossError: a loss or gradient is NaN or infinite. The last checkpoint is kept.
        ResumeError: ``resume_from`` does not give the loss that was noted when it was saved.
    """
    num_steps = settings.num_steps(num_rows(dataset))
    per_epoch = settings.steps_per_epoch(num_rows(dataset))
    order = order_steps(dataset, settings)
    fit = fit or Fit.unmeasured(settings, forward.checkpointing, forward.device)
    forward.set_checkpointing(fit.gradient_checkpointing)
    evaluate_every = settings.evaluate_every or per_epoch
    save_every = settings.save_every or per_epoch
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        group_parameters(model, method), lr=learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    # float16 has gradients too small for its range: they are scaled up, and a step that overflows is left out.
    is_float16 = forward.dtype is torch.float16
    scaler = torch.amp.GradScaler(forward.device.type, enabled=is_float16)
    best: float | None = None
    first_step = 0
    if resume_from is not None:
        load_checkpoint(resume_from, model, optimizer, scaler, team)
        first_step, best = resume_from.step, resume_from.best_validation
        if team.is_first:
            prune_checkpoints(run_dir, first_step, settings.keep_checkpoints)
        probe = order.examples_of(first_step - 1)[0]
        _check_probe(_probe_loss(model, forward, dataset, probe), resume_from)
    team.copy_from_first(trained)
    asking = functools.partial(_asking, model, settings, forward, team)
    overflows = 0

    for step in range(first_step, num_steps):
        started = time.perf_counter()
        memory_note = None
        examples = order.examples_of(step)
        objective.look_ahead(dataset, examples, "train", asking(fit))
        while True:
            packs = _pack(dataset, examples, settings, forward, fit, team)
            count = sum(objective.count(pack) for pack in packs)
            model.train()
            optimizer.zero_grad(set_to_none=True)
            share = team.share(packs, forward.cost, evenly=forward.is_sharded)
            found = _accumulate(
                model, packs, share, objective, count, forward, scaler, fit, (settings.seed, step), team
            )
            told = found or [0.0] * (1 + len(objective.tells))
            num_out_of_memory, loss, *means = team.total(found is None, *told)
            if not num_out_of_memory:
                team.sum_gradients(trained)
                break
            optimizer.zero_grad(set_to_none=True)
            give_back_freed_memory()
            largest = max(pack.num_tokens for pack in packs)
            smaller = fit.after_out_of_memory(
                largest, longest_input(dataset), may_checkpoint and forward.can_checkpoint
            )
            if smaller is None:
                raise TrainingError(does_not_fit(dataset, free_bytes(forward.device)))
            memory_note = f"Out of memory in a pack of {largest:,} tokens. From step {step + 1} on: {smaller}"
            fit = smaller
            forward.set_checkpointing(fit.gradient_checkpointing)
            record_fit(fit)
        scaler.unscale_(optimizer)
        grad_norm = float(torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm))
        overflows = 0 if math.isfinite(grad_norm) else overflows + 1
        allowed = _MOST_OVERFLOWS if is_float16 else 0
        if not math.isfinite(loss) or overflows > allowed:
            raise NonFiniteLossError(
                _name_bad_rows(model, forward, dataset, packs, step + 1, loss, grad_norm)
            )
        rate = learning_rate_at(step, num_steps, settings, learning_rate)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["rate_multiple"]
        scaler.step(optimizer)
        scaler.update()
        after_step(model, step)
        seconds = time.perf_counter() - started

        done = step + 1
        stopping = team.any(should_stop())
        last = done == num_steps
        validation_loss, validated = None, None
        is_best = False
        if validation is not None and (done % evaluate_every == 0 or last):
            validation_loss, *of_validation = mean_losses(
                model,
                validation,
                settings,
                forward,
                objective=objective,
                name="validation",
                fit=fit,
                team=team,
            )
            is_best = best is None or validation_loss < best
            best = validation_loss if is_best else best
            validated = dict(zip(objective.tells, of_validation, strict=True)) or None
        report = StepReport(
            step=done,
            num_steps=num_steps,
            epoch=done / per_epoch,
            loss=loss,
            learning_rate=rate,
            grad_norm=grad_norm,
            num_tokens=sum(pack.num_tokens for pack in packs),
            num_learnt_tokens=sum(pack.num_learnt for pack in packs),
            seconds=seconds,
            validation_loss=validation_loss,
            memory_note=memory_note,
            measured=dict(zip(objective.tells, means, strict=True)) or None,
            validation_measured=validated,
        )
        record(report)
        if done % save_every == 0 or last or stopping or is_best:
            probe_loss = _probe_loss(model, forward, dataset, order.examples_of(step)[0])
            if team.is_first:
                folder = save_checkpoint(
                    run_dir,
                    model,
                    optimizer,
                    scaler,
                    step=done,
                    probe_loss=probe_loss,
                    best_validation=best,
                    is_best=is_best,
                    keep=settings.keep_checkpoints,
                )
                report = replace(report, checkpoint=folder)
        yield report
        if stopping:
            return


@torch.no_grad()
def mean_losses(
    model: PeftModel | PreTrainedModel,
    dataset: Sequence[TokenizedExample],
    settings: TrainingSettings,
    forward: PackForward,
    *,
    objective: Objective = NEXT_TOKEN,
    name: str | None = None,
    fit: Fit | None = None,
    team: Team = ALONE,
) -> list[float]:
    """Return the mean loss over all learnt tokens (or pairs) of ``dataset``, in nats, without dropout.

    Behind it stand the means of what the objective tells.
    """
    model.eval()
    fit = fit or Fit.unmeasured(settings, forward.checkpointing, forward.device)
    totals, count = [0.0] * (1 + len(objective.tells)), 0
    for low in range(0, len(dataset), 64):
        indices = range(low, min(low + 64, len(dataset)))
        if name is not None:
            objective.look_ahead(dataset, indices, name, _asking(model, settings, forward, team, fit))
        packs = _pack(dataset, indices, settings, forward, fit, team)
        count += sum(objective.count(pack) for pack in packs)
        for place, weight in team.share(packs, forward.cost, evenly=forward.is_sharded):
            loss, told = objective.loss(forward, packs[place], name)
            found = (loss.item(), *told)
            totals = [total + weight * value for total, value in zip(totals, found, strict=True)]
    return [total / count for total in team.total(*totals)]


def _asking(
    model: PeftModel | PreTrainedModel, settings: TrainingSettings, forward: PackForward, team: Team, fit: Fit
) -> Ask:
    """Return what asks the model, as it is when it is called, for log probabilities; all of the team call it."""

    @torch.no_grad()
    def ask(examples: Sequence[TokenizedExample]) -> np.ndarray:
        model.eval()
        indices = range(len(examples))
        packs = _pack(examples, indices, settings, forward, fit, team)
        return ask_packs(forward, packs, indices, None, team)

    return ask


def _accumulate(
    model: PeftModel | PreTrainedModel,
    packs: list[Pack],
    share: list[tuple[int, float]],
    objective: Objective,
    count: int,
    forward: PackForward,
    scaler: torch.amp.GradScaler,
    fit: Fit,
    seed_and_step: tuple[int, int],
    team: Team,
) -> list[float] | None:
    """Add the gradients of what the packs of ``share`` give to the mean.

    Return that mean and those of what the objective tells, as far as these packs give them; None if memory ran out.
    """
    means = [0.0] * (1 + len(objective.tells))
    try:
        for place, weight in share:
            pack = packs[place]
            if not forward.is_sharded and not has_room_for(pack, fit, forward.device, team.local_count):
                return None
            # Dropout's masks depend on seed, step and pack only, not on when and where the pack is computed.
            seeds = np.random.SeedSequence((*seed_and_step, place))
            torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
            total, told = objective.loss(forward, pack, "train")
            mean = total * weight / count
            scaler.scale(mean).backward()
            means[0] += mean.item()
            for number, value in enumerate(told, start=1):
                means[number] += value * weight / count
        more = penalty(model) if team.is_first else None  # once a step, however many processes
        if more is not None:  # steers the step, and is no part of the loss that is told
            scaler.scale(more).backward()
    except (RuntimeError, MemoryError) as error:
        # Without this process the others would wait for a sharded layer: no second try.
        if forward.is_sharded or not is_out_of_memory(error):
            raise
        return None  # behind this line the traceback lets go of the pass's tensors
    return means


def _pack(
    dataset: Sequence[TokenizedExample],
    indices: Sequence[int],
    settings: TrainingSettings,
    forward: PackForward,
    fit: Fit,
    team: Team,
) -> list[Pack]:
    return pack_examples(
        dataset,
        indices,
        max_tokens=fit.micro_batch_tokens,
        max_examples=settings.micro_batch_size,
        num_processes=team.count,
        together=examples_per_row(dataset),
        share_prefixes=forward.share_prefixes,
        cost=forward.cost,
    )


@torch.no_grad()
def _probe_loss(
    model: PeftModel | PreTrainedModel,
    forward: PackForward,
    dataset: Sequence[TokenizedExample],
    example: int,
) -> float:
    """Return the mean loss of one example with the weights as they are: what a resumed run must get again."""
    model.eval()
    (pack,) = pack_examples(
        dataset, [example], max_tokens=len(dataset[example].input_ids), share_prefixes=forward.share_prefixes
    )
    return forward.summed_loss(pack, "train").item() / pack.num_learnt


def _check_probe(found: float, checkpoint: Checkpoint) -> None:
    if not math.isclose(found, checkpoint.probe_loss, rel_tol=_PROBE_TOLERANCE):
        raise ResumeError(
            f"{checkpoint.folder} was saved with a loss of {checkpoint.probe_loss:.6f} on an example of its last "
            f"step; the same example now gives {found:.6f}. The base, the data or the code has changed since. "
            "Go back to what the run was started with, or start a new run.name."
        )


@torch.no_grad()
def _name_bad_rows(
    model: PeftModel | PreTrainedModel,
    forward: PackForward,
    dataset: Sequence[TokenizedExample],
    packs: list[Pack],
    step: int,
    loss: float,
    grad_norm: float,
) -> str:
    """Return the error text for a step that went wrong, with the rows whose own loss is not finite, or all rows."""
    examples = [example for pack in packs for example in pack.examples]
    model.eval()
    bad = []
    for example in examples:
        length = len(dataset[example].input_ids)
        pack = pack_examples(dataset, [example], max_tokens=length, share_prefixes=False)[0]
        if not math.isfinite(forward.summed_loss(pack).item()):
            bad.append(example)
    named = ", ".join(dataset[example].where for example in bad or examples)
    what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {grad_norm}"
    which = "the rows with such a loss" if bad else "the rows of this step"
    return (
        f"The {what} at step {step}; {which}: {named}. The checkpoint before it is kept. "
        "Look at these rows, lower training.learning_rate, or set base.dtype=float32."
    )
