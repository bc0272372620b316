"""How far a run is, read from its folder alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lorasmith.errors import RunError
from lorasmith.model.run_record import describe_run, list_runs, read_run_record
from lorasmith.serve.studio.jobs import find, read_log
from lorasmith.serve.studio.places import Places
from lorasmith.training.reporters import read_metrics, read_samples

State = Literal["preparing", "training", "reporting", "finished", "stopped", "failed"]
_STEPS_AVERAGED = 20


@dataclass(frozen=True, slots=True)
class Progress:
    """One run at this moment. ``metrics`` are the lines of metrics.jsonl, ``samples`` those of samples.jsonl."""

    name: str
    state: State
    metrics: Sequence[dict[str, Any]] = ()
    samples: Sequence[dict[str, Any]] = ()
    log: str = ""
    is_ours: bool = field(default=False)  # its process was started here and can be stopped here

    @property
    def seconds_left(self) -> float | None:
        """The time that the steps left will take at the speed of the last ones; None before the first."""
        if not self.metrics:
            return None
        last = self.metrics[-_STEPS_AVERAGED:]
        steps_left = self.metrics[-1]["num_steps"] - self.metrics[-1]["step"]
        return steps_left * sum(metrics["seconds"] for metrics in last) / len(last)


def read_progress(places: Places, name: str) -> Progress:
    """Return how far the run is.

    Raises:
        RunError: there is no such run, or its run.json cannot be read.
    """
    run_dir = places.run(name)
    if not run_dir.is_dir():
        raise RunError(f"There is no run {name} in {places.runs}. Choose one from the list.")
    is_ours = find(run_dir, "train") is not None
    metrics = read_metrics(run_dir / "metrics.jsonl")
    return Progress(
        name,
        _state(run_dir, is_ours, has_steps=bool(metrics)),
        metrics,
        read_samples(run_dir),
        read_log(run_dir, "train"),
        is_ours,
    )


def _state(run_dir: Path, is_ours: bool, *, has_steps: bool) -> State:
    if not (run_dir / "run.json").is_file():
        return "preparing" if is_ours else "failed"
    record = read_run_record(run_dir)
    if record.result is not None:
        return "reporting" if is_ours else "finished"
    if is_ours:  # while it is, its lock is left alone: a look at it could meet the process that wants it
        return "training" if has_steps else "preparing"
    state = describe_run(run_dir, record)["state"]
    return "training" if state == "training" else "stopped" if state == "stopped" else "failed"


def list_names(places: Places) -> list[str]:
    """Return the names of all runs, the newest first; those that are only being prepared come first."""
    if not places.runs.is_dir():
        return []
    recorded = [folder.relative_to(places.runs).as_posix() for folder, _ in list_runs(places.runs)]
    begun = [
        file.parent.relative_to(places.runs).as_posix() for file in places.runs.glob("*/train.process.json")
    ]
    return [*sorted(name for name in begun if name not in recorded), *recorded]
