"""A run folder from settings: everything between "train this" and the first step, and after the last.

runs/handbook/
  run.json        written before the first step, and again with the result
  receipt.json    what became of every row
  metrics.jsonl   every step        loss.png   the same as a picture
  samples.jsonl   what run.sample_questions were answered on the way
  checkpoints/    while training, and after it the last and the best
  adapter/        plain PEFT: the result (full fine-tuning: model/)
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from filelock import FileLock, Timeout
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorasmith.data.dataset import TokenizedDataset
from lorasmith.data.example import Message
from lorasmith.data.prompts import PromptRecipe, choose_recipe
from lorasmith.data.settings import DataSettings, PromptSettings
from lorasmith.data.tokens import TokenizedExample, num_rows
from lorasmith.engine.forward import PackForward
from lorasmith.engine.settings import EngineSettings
from lorasmith.errors import RunError, SettingsError
from lorasmith.files import digest, storing, write_whole
from lorasmith.model.base import ResolvedBase, load_base, load_tokenizer, resolve_base
from lorasmith.model.device import DeviceChoice
from lorasmith.model.memory import measure_peak
from lorasmith.model.method_settings import FullSettings, MethodSettings
from lorasmith.model.methods import (
    attach_adapter,
    check_method,
    count_frozen,
    count_trainable,
    num_virtual_tokens,
    train_all_weights,
)
from lorasmith.model.run_record import LOCK, RunRecord, read_run_record, write_run_record
from lorasmith.model.settings import BaseSettings
from lorasmith.model.trained import ADAPTER, MODEL, save_trained
from lorasmith.packing.plan import Gain, predict_gain
from lorasmith.training.checkpoint import Checkpoint
from lorasmith.training.distributed import ALONE, Team
from lorasmith.training.estimate import in_steps, in_words, tokens_to_ask, tokens_to_compute
from lorasmith.training.fit import Fit, choose_fit, run_tokens
from lorasmith.training.kto import Kto, advise_weights, check_labels, check_objective
from lorasmith.training.loop import StepReport, train
from lorasmith.training.objective import NEXT_TOKEN, Objective
from lorasmith.training.preference import Preference, reference_log_probs
from lorasmith.training.read_rows import read_rows
from lorasmith.training.rehearsal import Rehearsal, build_without_weights, copy_without_weights
from lorasmith.training.reporters import MetricsFile, Trackers, check_trackers, draw_loss, read_metrics
from lorasmith.training.same_run import what_to_resume
from lorasmith.training.schedule import order_steps
from lorasmith.training.settings import ObjectiveSettings, OutputSettings, TrainingSettings
from lorasmith.training.settled import (
    Say,
    recorded_fit,
    settle_device,
    settle_engine,
    settle_rate,
    settle_threads,
    with_fit,
    with_settled,
)
from lorasmith.training.sharding import check_gathered, check_sharding, shard_base

Progress = Callable[[str, float], None]  # what is being done, and the share of it that is

_SHARE_OF_MEMORY_FOR_FROZEN_STATES = 0.25


class RunSettings(Protocol):
    """What a run depends on, a section of the run file each; cli/run_file.py reads it."""

    @property
    def base(self) -> BaseSettings: ...
    @property
    def data(self) -> DataSettings: ...
    @property
    def prompt(self) -> PromptSettings: ...
    @property
    def method(self) -> MethodSettings: ...
    @property
    def engine(self) -> EngineSettings: ...
    @property
    def training(self) -> TrainingSettings: ...
    @property
    def objective(self) -> ObjectiveSettings: ...
    @property
    def run(self) -> OutputSettings: ...
    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


@dataclass(frozen=True)
class TrainingJob:
    """A run that is ready for its first (or next) step."""

    run_dir: Path
    record: RunRecord
    recipe: PromptRecipe
    tokenizer: PreTrainedTokenizerBase
    model: PeftModel | PreTrainedModel
    method: MethodSettings
    forward: PackForward
    dataset: Sequence[TokenizedExample]
    validation: Sequence[TokenizedExample] | None
    training: TrainingSettings
    output: OutputSettings
    learning_rate: float
    resume_from: Checkpoint | None
    gain: Gain
    fit: Fit
    may_checkpoint: bool
    team: Team
    objective: Objective

    @property
    def num_steps(self) -> int:
        return self.training.num_steps(num_rows(self.dataset))


def check_settings(asked: RunSettings) -> None:
    """Refuse settings that do not go together, as far as it is seen without data and base.

    Raises:
        SettingsError: names those that do not.
    """
    data, training = asked.data, asked.training
    check_method(asked.method, asked.base)
    check_objective(asked.objective, asked.method, training)
    check_sharding(asked.engine, asked.method, asked.base, asked.run)
    if data.validation is not None and training.validation_share > 0:
        raise SettingsError(
            f"Both data.validation ({data.validation}) and training.validation_share ({training.validation_share:g}) "
            "are set. Use one: the file, or a share of the training data."
        )


def prepare_job(
    run_dir: Path,
    asked: RunSettings,
    *,
    say: Say = lambda line: None,
    progress: Progress = lambda what, share: None,
    must_measure: bool = False,
    team: Team = ALONE,
) -> TrainingJob:
    """Read the data, load the base, attach the adapter, and write run.json and receipt.json to ``run_dir``.

    What is ``asked`` is recorded as plain values, and compared when a run goes on.
    ``must_measure``: measure memory and time on the heaviest pack even where that costs more than the run is worth, and
    ask the base for no reference: for an estimate, which takes no step.

    Of a ``team`` every process gets the job; the first one reads and writes ``run_dir``, measures and decides.

    Raises:
        LorasmithError: anything is wrong with the settings, the data, the base, or the run that is gone on with.
    """
    base, data, prompt, method = asked.base, asked.data, asked.prompt, asked.method
    engine, training, objective, output = asked.engine, asked.training, asked.objective, asked.run
    settings = asked.model_dump(mode="json")
    check_trackers(output.trackers)
    check_settings(asked)
    then = _read_record(run_dir, team)
    threads = settle_threads(then, engine, say, team)
    choice = settle_device(then, base, method, team)
    # What "auto" meant is recorded: a run that goes on later must not measure again and get something else.
    found = {"dtype": str(choice.dtype).removeprefix("torch."), "device": choice.device.type}
    settings = {
        **settings,
        "base": {**settings["base"], **found},
        "engine": {**settings["engine"], "threads": threads},
    }
    with team.first_on_each_machine():
        resolved = resolve_base(base, tell=say)
    tokenizer = load_tokenizer(resolved, trust_remote_code=base.trust_remote_code)
    recipe, reason = choose_recipe(prompt, tokenizer, objective.kind)
    note = "; for asking only: texts are learnt without a template" if objective.kind == "documents" else ""
    say(f"Prompt recipe: {recipe.name} ({reason}{note})")

    _check_samples(output.sample_questions, recipe)

    rows = read_rows(data, training, objective.kind, recipe, tokenizer, say=say, progress=progress, team=team)
    dataset, validation = rows.dataset, rows.validation
    record = RunRecord(
        name=run_dir.name,
        base=resolved.ref,
        recipe=recipe.to_json(),
        settings=settings,
        data=rows.noted,
        processes=team.count,
    )
    team.check_same(_what_must_agree(record))
    resume_from = what_to_resume(run_dir, then, record, output, say, team)

    held = "" if base.quantization == "none" else f"; the frozen weights are held as {base.quantization}"
    say(f"Number format: {found['dtype']} ({choice.reason}){held}")
    num_steps = training.num_steps(num_rows(dataset))
    is_sharded = engine.shard_base and team.count > 1
    model = _load_model(
        resolved, choice, base, method, training.seed, num_steps, team if is_sharded else None
    )
    if advice := _check_context(model, int(dataset.lengths.max())):
        say(advice)
    if is_sharded:
        engine = engine.model_copy(update={"compile": False, "reuse_frozen_layers": False})
    engine = settle_engine(then, engine, model, run_tokens(dataset, training), say, team)
    settled = recorded_fit(then, training, engine)
    why = "as at the run's start"
    if is_sharded and settled is None:
        settled = Fit.unmeasured(training, engine.gradient_checkpointing is not False, choice.device)
        why = "not measured: a pass over a sharded base takes all processes"
    rehearsal = None
    if settled is None and team.is_first:
        rehearsal = _make_rehearsal(
            model, engine, resolved, base, method, training.seed, num_steps, found["dtype"]
        )
    forward = PackForward(model, engine)
    rate = settle_rate(then, training, method, objective, model, num_steps, say)
    say(_describe_size(model, method))
    for note in forward.notes:
        say(f"Note: {note}")

    _keep_frozen_states(forward, dataset, validation, training, team, say, progress)
    base_key = f"{resolved.ref.fingerprint} {base.quantization} {found['dtype']}"
    learns = _make_objective(
        objective,
        not must_measure,
        base_key,
        model,
        forward,
        method,
        dataset,
        validation,
        training,
        data,
        team,
        say,
        progress,
    )
    gain = predict_gain(dataset, training.batch_size, order=order_steps(dataset, training).examples_of)
    if settled is not None:
        fit = settled
        say(f"Memory: {fit} ({why})")
    else:
        fit = _measure_fit(model, forward, rehearsal, dataset, training, engine, must_measure, team)
        say(f"Memory: {fit}. The largest pack has {fit.largest_pack_tokens:,}; {fit.reason}")
        if fit.measured_tokens:
            say(_describe_time(fit, gain, num_rows(dataset), training, objective, forward, team))
    forward.set_checkpointing(fit.gradient_checkpointing)

    if resume_from is not None:
        assert then is not None, "a checkpoint to go on from lies beside its run.json"
        record = then.model_copy(update={"processes": team.count})
    record = with_fit(with_settled(record, engine, rate), fit)
    if team.is_first:
        write_run_record(run_dir, record)
    if team.is_first and resume_from is None:
        write_whole(run_dir / "receipt.json", json.dumps(rows.receipt.to_json(), indent=2) + "\n")
    return TrainingJob(
        run_dir,
        record,
        recipe,
        tokenizer,
        model,
        method,
        forward,
        dataset,
        validation,
        training,
        output,
        rate,
        resume_from,
        gain,
        fit,
        may_checkpoint=engine.gradient_checkpointing is not False,
        team=team,
        objective=learns,
    )


def _check_samples(questions: Sequence[str], recipe: PromptRecipe) -> None:
    """Raise SettingsError or RecipeError for a sample question that could not be asked during the training."""
    for question in questions:
        if not question.strip():
            raise SettingsError("run.sample_questions holds an empty question.")
        recipe.render_prompt((Message("user", question),))


def _load_model(
    resolved: ResolvedBase,
    choice: DeviceChoice,
    base: BaseSettings,
    method: MethodSettings,
    seed: int,
    num_steps: int,
    shared_by: Team | None,
) -> PeftModel | PreTrainedModel:
    """Return the base with what is trained on it; cut among the processes of ``shared_by``, if there is one."""

    def load(where: DeviceChoice) -> PeftModel | PreTrainedModel:
        loaded = load_base(
            resolved,
            where,
            trust_remote_code=base.trust_remote_code,
            quantization=base.quantization,
            can_be_cut=shared_by is not None,
        )
        if isinstance(method, FullSettings):
            return train_all_weights(loaded)
        return attach_adapter(loaded, method, seed=seed, num_steps=num_steps)

    if shared_by is None:
        return load(choice)
    with shared_by.in_turn():
        model = load(replace(choice, device=torch.device("cpu")))  # whole, it does not fit the device
        assert isinstance(model, PeftModel), "check_sharding lets nothing else through"
        packed = shard_base(model, shared_by, choice.device)
    check_gathered(model, packed)
    return model


def _check_context(model: PeftModel | PreTrainedModel, longest: int) -> str | None:
    """Return a warning where the ``longest`` example has more tokens than the model was made for.

    Raises:
        SettingsError: virtual tokens stand before it, and leave it no room: a model trained so could not be asked.
    """
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    virtual = num_virtual_tokens(model)
    if room is None or virtual + longest <= room:
        return None
    if virtual:
        raise SettingsError(
            f"method.num_virtual_tokens is {virtual:,}, the longest example has {longest:,} tokens, and the model "
            f"reads at most {room:,} together. Use fewer virtual tokens, or leave long examples out: "
            "data.max_seq_len and data.overlong=drop."
        )
    return (
        f"Warning: the longest example has {longest:,} tokens, and the model reads at most {room:,}: places beyond are "
        f"new to it, and so long a question cannot be asked. Use data.max_seq_len={room} or less."
    )


def _make_rehearsal(
    model: PeftModel | PreTrainedModel,
    engine: EngineSettings,
    resolved: ResolvedBase,
    base: BaseSettings,
    method: MethodSettings,
    seed: int,
    num_steps: int,
    dtype: str,
) -> Rehearsal:
    """Return the model without its weights, as it is before the engine changes the layers' forward."""
    if base.quantization == "none":
        return Rehearsal(copy_without_weights(model), engine)
    # A quantised weight has no copy without numbers: its layers are rehearsed as they were.
    sketch = build_without_weights(
        resolved.folder,
        method,
        dtype,
        seed=seed,
        num_steps=num_steps,
        trust_remote_code=base.trust_remote_code,
        quantization=base.quantization,
    )
    return Rehearsal(sketch, engine, base.quantization)


def _describe_size(model: PeftModel | PreTrainedModel, method: MethodSettings) -> str:
    trained = count_trainable(model)
    if isinstance(method, FullSettings):
        size = 16 * trained / 2**30
        return f"Method: full, {trained:,} numbers train; with gradients and AdamW's moments they take {size:.2f} GiB"
    return (
        f"Adapter ({method.name}): {trained:,} trainable numbers beside {count_frozen(model):,} frozen ones"
    )


def _describe_time(
    fit: Fit,
    gain: Gain,
    count: int,
    training: TrainingSettings,
    objective: ObjectiveSettings,
    forward: PackForward,
    team: Team,
) -> str:
    """Return how long the run of ``count`` rows takes at the measured speed; the reference has been asked by then."""
    num_asked = tokens_to_ask(gain, count, training, objective, forward, has_reference=True)
    num_tokens = tokens_to_compute(gain, count, training, forward)
    seconds = in_steps(num_tokens, num_asked) * fit.seconds_per_token
    by = "" if team.count == 1 else f" by one process, {team.count} times as many by all at best"
    return (
        f"Time: about {in_words(seconds / team.count)}, "
        f"at {1 / fit.seconds_per_token:,.0f} tokens a second as measured{by}"
    )


def _keep_frozen_states(
    forward: PackForward,
    dataset: TokenizedDataset,
    validation: TokenizedDataset | None,
    training: TrainingSettings,
    team: Team,
    say: Say,
    progress: Progress,
) -> None:
    """Compute what no step changes once, where the data is read more than once and memory has room for it."""
    room = int(psutil.virtual_memory().total * _SHARE_OF_MEMORY_FOR_FROZEN_STATES / team.local_count)
    for name, examples in (("train", dataset), ("validation", validation)):
        passes = training.epochs if name == "train" else 2
        if examples is not None and passes > 1:
            note = forward.keep_frozen_states(
                name,
                examples,
                max_tokens=Fit.unmeasured(training, False, forward.device).micro_batch_tokens,
                max_bytes=room,
                on_progress=lambda done, total: progress("Computing the frozen layers", done / total),
            )
            if note and name == "train":
                say(f"Frozen layers: {note}")


def _measure_fit(
    model: PeftModel | PreTrainedModel,
    forward: PackForward,
    rehearsal: Rehearsal | None,
    dataset: TokenizedDataset,
    training: TrainingSettings,
    engine: EngineSettings,
    must_measure: bool,
    team: Team,
) -> Fit:
    """Return how steps are cut into packs; the first process, which has the ``rehearsal``, decides for all."""
    team.wait()  # the memory that is free is looked at when every process has taken its part

    def choose() -> dict[str, Any]:
        assert rehearsal is not None, "made where nothing is settled"
        return choose_fit(
            model,
            forward,
            rehearsal,
            dataset,
            training,
            engine.gradient_checkpointing,
            must_measure=must_measure,
            num_sharing=team.local_count,
        ).to_json()

    return Fit.from_json(team.from_first(choose))


def run_job(job: TrainingJob, should_stop: Callable[[], bool] = lambda: False) -> Iterator[StepReport]:
    """Do the job's steps, yield a report after each, and save the adapter after the last.

    Stopped early by ``should_stop``, the run keeps a checkpoint to go on from and gets no adapter/. Every process of
    a team yields the same reports; the first one writes.
    """
    first_step = job.resume_from.step if job.resume_from else 0
    steps = partial(
        train,
        job.model,
        job.dataset,
        job.training,
        forward=job.forward,
        learning_rate=job.learning_rate,
        objective=job.objective,
        run_dir=job.run_dir,
        fit=job.fit,
        may_checkpoint=job.may_checkpoint,
        method=job.method,
        validation=job.validation,
        resume_from=job.resume_from,
        should_stop=should_stop,
        team=job.team,
    )
    if not job.team.is_first:
        yield from steps()
        job.team.wait()  # for the files that the first process still writes
        return
    metrics = MetricsFile(job.run_dir / "metrics.jsonl", first_step=first_step)
    trackers = Trackers(job.output.trackers, job.run_dir, job.record.settings)
    started = time.monotonic()
    report = None
    record = job.record

    def record_fit(fit: Fit) -> None:
        nonlocal record
        record = with_fit(record, fit)
        write_run_record(job.run_dir, record)

    try:
        with measure_peak(job.forward.device) as peak:
            for report in steps(record=metrics.write, record_fit=record_fit):
                trackers.log(report)
                yield report
    finally:
        metrics.close()
        trackers.close()
        draw_loss(job.run_dir, record.row_kind)
    if report is None or report.step == report.num_steps:
        _finish(job, record, time.monotonic() - started, peak.during)
    job.team.wait()


def _make_objective(
    objective: ObjectiveSettings,
    asks_base: bool,
    base_key: str,
    model: PeftModel | PreTrainedModel,
    forward: PackForward,
    method: MethodSettings,
    dataset: TokenizedDataset,
    validation: TokenizedDataset | None,
    training: TrainingSettings,
    data: DataSettings,
    team: Team,
    say: Say,
    progress: Progress,
) -> Objective:
    """Return what the loop minimises, with the reference's log probabilities where it needs them.

    Without ``asks_base`` the next token, which costs as much: no step will be taken.
    """
    if objective.name in ("sft", "text"):
        return NEXT_TOKEN
    if objective.name == "kto":
        check_labels(dataset.is_rejected, data.train)
        num_bad = int(dataset.is_rejected.sum())
        say(f"Labels: {len(dataset) - num_bad:,} answers are good (true), {num_bad:,} bad (false)")
        if advice := advise_weights(dataset.is_rejected, objective):
            say(f"Note: the two kinds do not weigh alike; {advice} would balance them.")
    if not asks_base:
        return NEXT_TOKEN
    references = {}
    if objective.needs_reference:
        say("Reference: the base's log probabilities of the answers (computed once and kept for later runs)")
    both = {"train": dataset} if validation is None else {"train": dataset, "validation": validation}
    for name, examples in both.items():
        if objective.needs_reference:
            references[name] = reference_log_probs(
                model,
                forward,
                examples,
                name,
                method,
                base_key=base_key,
                cache=data.cache_dir,
                team=team,
                max_tokens=Fit.unmeasured(training, False, forward.device).micro_batch_tokens,
                on_progress=lambda share: progress("Asking the base for its log probabilities", share),
            )
    if objective.name != "kto":
        return Preference(objective, references)
    assert isinstance(model, PeftModel), "check_objective has refused full fine-tuning"
    return Kto(
        model,
        objective,
        references,
        {name: examples.is_rejected for name, examples in both.items()},
        max(int(examples.lengths.max()) for examples in both.values()),
    )


def _finish(job: TrainingJob, record: RunRecord, seconds: float, peak_bytes: int) -> None:
    """Save what was trained and write the result into run.json."""
    norm = save_trained(job.model, job.run_dir, tokenizer=job.tokenizer)
    folder = next(place for name in (ADAPTER, MODEL) if (place := job.run_dir / name).is_dir())
    steps = read_metrics(job.run_dir / "metrics.jsonl")
    result = {
        "steps": job.num_steps,
        "final_loss": steps[-1]["loss"],
        "validation_loss": next(
            (m["validation_loss"] for m in reversed(steps) if "validation_loss" in m), None
        ),
        "tokens": sum(m["num_tokens"] for m in steps),
        "training_seconds": round(sum(m["seconds"] for m in steps), 1),
        "seconds": round(seconds, 1),
        "peak_bytes": peak_bytes,
        "update_norm": norm,
        "trainable_numbers": count_trainable(job.model),
        "frozen_numbers": count_frozen(job.model),
        "saved_bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
    }
    write_run_record(job.run_dir, record.model_copy(update={"result": result}))


@contextmanager
def hold_run(run_dir: Path) -> Iterator[None]:
    """Keep other processes from training into ``run_dir`` at the same time; the lock dies with the process.

    What a killed process left half-written is removed.

    Raises:
        RunError: another process holds it.
    """
    lock = FileLock(run_dir / LOCK, timeout=0)
    with storing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise RunError(
                f"{run_dir} is being trained by another process. Wait for it, or choose another name with "
                "run.name=NAME."
            ) from None
    try:
        for leftover in [*run_dir.glob(".*.part"), *run_dir.glob("checkpoints/.*.part")]:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        yield
    finally:
        if [path.name for path in run_dir.iterdir()] == [LOCK]:  # nothing came of it
            shutil.rmtree(run_dir)
        lock.release()


def _read_record(run_dir: Path, team: Team) -> RunRecord | None:
    """Return the record of the run that is gone on with, from the process that has the run folder."""

    def read() -> dict[str, Any] | None:
        if not (run_dir / "run.json").is_file():
            return None
        return read_run_record(run_dir).model_dump(mode="json")

    fields = team.from_first(read)
    return None if fields is None else RunRecord.model_validate(fields)


def _what_must_agree(record: RunRecord) -> dict[str, str]:
    """Return what every process of a run must have found alike, by its name on the screen."""
    return {
        "weights of the base": record.base.fingerprint,
        "data": digest(record.data),
        "prompt recipe": digest(record.recipe),
        "settings": digest({key: value for key, value in record.settings.items() if key != "run"}),
        "versions of libraries": digest(record.versions),
    }
