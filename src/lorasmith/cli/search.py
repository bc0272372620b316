"""Learning rates and ranks tried under a time budget, by Optuna: ``lorasmith compare --search``.

A trial is one training of the same data, split and token budget, judged by its last validation loss; one that is
behind the median of the others at the same step is ended early. The study is kept on disk after every step, so a
search that was stopped goes on.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorasmith.cli.apart import Metrics, read_newest, train_apart
from lorasmith.cli.candidates import Candidate, change, num_steps_of
from lorasmith.cli.run_file import RunFile, write_run_file
from lorasmith.errors import MissingExtraError, SettingsError, TrainingError

if TYPE_CHECKING:
    from optuna import Study, Trial

STUDY_FILE = "search.log"
_RATE_SPAN = 8.0  # rates from an eighth of a method's own to eight times it
_RANKS = (4, 8, 16, 32, 64)
_TRIALS_BEFORE_ENDING_ANY = 3
_SECONDS = "seconds"  # what a trial took, among what the study notes of it

Settings = Mapping[str, Any]  # learning_rate, and r where the method is one of low rank
End = Literal["finished", "behind", "out of time", "stopped"]
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Tried:
    """What a candidate gave with some settings, trained to its end; ``is_own``: they are what it has untried."""

    name: str
    settings: Settings
    is_own: bool
    loss: float  # the last validation loss


@dataclass(frozen=True, slots=True)
class Space:
    """What is tried of one candidate: rates around its own, and ranks."""

    rate: float
    ranks: tuple[int, ...]  # its own first; () where the method has none

    @property
    def own(self) -> Settings:
        return {"learning_rate": self.rate, **({"r": self.ranks[0]} if self.ranks else {})}

    def suggest(self, trial: "Trial", name: str) -> Settings:
        """Return the settings that Optuna draws for ``trial``, a trial of the candidate ``name``."""
        low, high = self.rate / _RATE_SPAN, self.rate * _RATE_SPAN
        found = {"learning_rate": trial.suggest_float(f"{name}.learning_rate", low, high, log=True)}
        if self.ranks:
            found["r"] = trial.suggest_categorical(f"{name}.r", self.ranks)
        return found


def open_study(candidates: Sequence[Candidate], folder: Path) -> "Study":
    """Return the study of these very candidates, new or as it was left; a trial that was cut off counts as failed.

    Raises:
        MissingExtraError: Optuna is not installed. SettingsError: there is no validation loss to search by, or there
            are those of several objectives.
    """
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise MissingExtraError("lorasmith compare --search", "optuna", "search") from None
    first = candidates[0].run_file
    if not (first.data.validation or first.training.validation_share):
        raise SettingsError(
            "A search needs a validation loss: what the best run is judged by must not have chosen it. Hold out a "
            "share of the training data, training.validation_share=0.2, or name data.validation=FILE."
        )
    if len(names := {candidate.run_file.objective.name for candidate in candidates}) > 1:
        raise SettingsError(
            f"A search chooses by the validation loss, and those of {' and '.join(sorted(names))} are no measure of "
            "each other. Search each objective by itself; without --search runs are compared by what they answer."
        )
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    wanted = [[candidate.name, candidate.run_file.model_dump(mode="json")] for candidate in candidates]
    backend = JournalFileBackend(str(folder / STUDY_FILE))
    study = optuna.create_study(
        study_name=hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16],
        storage=optuna.storages.JournalStorage(backend),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=_TRIALS_BEFORE_ENDING_ANY),
        load_if_exists=True,
    )
    # A seed that moves on: a search that goes on must not draw what it drew before.
    study.sampler = optuna.samplers.TPESampler(
        seed=first.training.seed + len(study.trials), n_startup_trials=2 + 2 * len(candidates)
    )
    for trial in study.trials:
        if trial.state == optuna.trial.TrialState.RUNNING:
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def search(
    study: "Study",
    candidates: Sequence[Candidate],
    folder: Path,
    minutes: float,
    tell: Tell = lambda line: None,
) -> tuple[list[Tried], bool]:
    """Return what was trained to its end in the study so far, the best first, and whether the search was stopped.

    Every candidate is tried with its own settings first, those that an earlier start did not come to the end of too;
    what earlier starts took counts among the ``minutes``.

    Raises:
        TrainingError: every trial failed; with the words of the last.
    """
    from optuna.trial import TrialState

    spaces = {candidate.name: space_of(candidate.run_file) for candidate in candidates}
    waiting = study.get_trials(states=(TrialState.WAITING,))
    for name, space in spaces.items():
        own = {"run": name, **{f"{name}.{key}": value for key, value in space.own.items()}}
        judged = any(
            trial.user_attrs.get("name") == name and trial.user_attrs["is_own"]
            for trial in study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
        )
        if not judged and all(trial.system_attrs.get("fixed_params") != own for trial in waiting):
            study.enqueue_trial(own)  # also where an earlier start was ended in the middle of it
    deadline = time.monotonic() + 60 * minutes - _seconds_spent(study)
    was_stopped = False
    while not was_stopped and time.monotonic() < deadline:
        trial, started = study.ask(), time.monotonic()
        name = trial.suggest_categorical("run", list(spaces))
        settings = spaces[name].suggest(trial, name)
        for key, value in (("name", name), ("settings", settings), ("is_own", settings == spaces[name].own)):
            trial.set_user_attr(key, value)
        told = f"trial {trial.number + 1}: {in_words(name, settings)}"
        chosen = next(candidate for candidate in candidates if candidate.name == name)
        try:
            try:
                end, loss = _train(trial, with_settings(chosen.run_file, settings), folder, deadline)
            finally:
                trial.set_user_attr(_SECONDS, time.monotonic() - started)
        except TrainingError as fault:
            study.tell(trial, state=TrialState.FAIL)
            tell(f"{told}: failed: {fault}")
            none_came_through = all(trial.state == TrialState.FAIL for trial in study.trials)
            if none_came_through and len(study.trials) > len(spaces):
                raise
            continue
        states = {"finished": TrialState.COMPLETE, "behind": TrialState.PRUNED}
        study.tell(trial, loss if end == "finished" else None, state=states.get(end, TrialState.FAIL))
        tell(f"{told}: validation loss {loss:.4f}" if end == "finished" else f"{told}: {end}, ended early")
        was_stopped = end == "stopped"
    done = [trial for trial in study.trials if trial.state == TrialState.COMPLETE]
    tried = [
        Tried(**{key: trial.user_attrs[key] for key in ("name", "settings", "is_own")}, loss=trial.value)
        for trial in done
        if trial.value is not None
    ]
    return sorted(tried, key=lambda one: one.loss), was_stopped


def space_of(run_file: RunFile) -> Space:
    """Return what is tried of a run: rates around the one that it has or would choose, and ranks of low-rank kinds."""
    rate, method = run_file.training.learning_rate, run_file.method
    if rate == "auto":
        from transformers import AutoConfig

        from lorasmith.model.base import resolve_base
        from lorasmith.training.schedule import choose_learning_rate

        folder = resolve_base(run_file.base, fetches_weights=False).folder
        trusts = run_file.base.trust_remote_code
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trusts)
        rate = choose_learning_rate(config, method, run_file.objective, num_steps_of(run_file))
    own = getattr(method, "r", None) if hasattr(method, "lora_alpha") else None
    return Space(rate, () if own is None else (own, *(r for r in _RANKS if r != own)))


def with_settings(run_file: RunFile, settings: Settings) -> RunFile:
    """Return ``run_file`` with a learning rate, and with a rank where there is one."""
    method = run_file.model_dump(mode="json", exclude_unset=True).get(
        "method", {"name": run_file.method.name}
    )
    rank = {key: value for key, value in settings.items() if key == "r"}
    return change(run_file, method={**method, **rank}, training={"learning_rate": settings["learning_rate"]})


def in_words(name: str, settings: Settings) -> str:
    """Return a candidate with its settings, as a line on the screen tells them."""
    rank = f", r {settings['r']}" if "r" in settings else ""
    return f"{name}, learning rate {settings['learning_rate']:.2g}{rank}"


def _train(trial: "Trial", run_file: RunFile, folder: Path, deadline: float) -> tuple[End, float]:
    """Train one trial in folder/trial and return how it ended, and its last validation loss."""
    run_dir, file = folder / "trial", folder / "trial.yaml"
    shutil.rmtree(run_dir, ignore_errors=True)
    quiet = {"root": str(folder.absolute()), "name": run_dir.name, "trackers": [], "sample_questions": []}
    write_run_file(file, change(run_file, run=quiet, report={"after_training": False}))
    end: End = "stopped"
    losses: dict[int, float] = {}

    def watch(steps: list[Metrics]) -> bool:
        nonlocal end
        for step in steps:
            if "validation_loss" in step and step["step"] not in losses:
                losses[step["step"]] = step["validation_loss"]
                trial.report(step["validation_loss"], step["step"])
        if steps and steps[-1]["step"] == steps[-1]["num_steps"]:
            return False  # nothing is left but to save it
        if time.monotonic() > deadline:
            end = "out of time"
        elif trial.should_prune():
            end = "behind"
        return end != "stopped"

    if train_apart(file, run_dir, folder / "trial.log", watch):
        end = "finished"
        watch(read_newest(run_dir / "metrics.jsonl"))
    shutil.rmtree(run_dir, ignore_errors=True)
    return end, losses[max(losses)] if losses else float("nan")


def _seconds_spent(study: "Study") -> float:
    """Return what trials took that came to an end of any kind; Optuna's own times run on after a crash."""
    return sum(trial.user_attrs.get(_SECONDS, 0.0) for trial in study.trials)
