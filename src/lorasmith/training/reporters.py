"""Who hears of each step: a file, a picture, and the experiment trackers that the user asks for."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorasmith.data.settings import RowKind
from lorasmith.errors import MissingExtraError
from lorasmith.files import storing, write_whole
from lorasmith.training.loop import StepReport

SAMPLES = "samples.jsonl"  # in a run folder: what the model answered while it learnt
# What the loss of a run is, by what its rows are.
LOSS_IS: Mapping[RowKind, str] = {
    "answers": "nats per learnt token",
    "documents": "nats per token",
    "pairs": "mean over pairs",
    "labelled": "mean over labelled answers",
}


class MetricsFile:
    """metrics.jsonl: one JSON object a step, on disk before the next step begins."""

    def __init__(self, path: Path, *, first_step: int = 0) -> None:
        """Open ``path``; lines after ``first_step`` belong to steps that a resumed run does again and go."""
        kept = (
            [metrics for metrics in read_metrics(path) if metrics["step"] <= first_step] if first_step else []
        )
        write_whole(path, "".join(json.dumps(metrics) + "\n" for metrics in kept))
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, report: StepReport) -> None:
        with storing(self._path):
            self._file.write(json.dumps(as_metrics(report)) + "\n")
            self._file.flush()

    def close(self) -> None:
        with storing(self._path):
            os.fsync(self._file.fileno())
            self._file.close()


def as_metrics(report: StepReport) -> dict[str, Any]:
    """Return ``report`` as plain numbers, without what was not measured in this step."""
    metrics = {
        key: value
        for key, value in asdict(report).items()
        if value is not None and key not in ("checkpoint", "measured", "validation_measured")
    }
    metrics |= report.measured or {}
    metrics |= {f"validation_{key}": value for key, value in (report.validation_measured or {}).items()}
    return {**metrics, "tokens_per_second": round(report.tokens_per_second, 1)}


def note_samples(run_dir: Path, step: int, asked: Sequence[tuple[str, str]]) -> None:
    """Add (question, answer) pairs of this step to samples.jsonl."""
    lines = [
        json.dumps({"step": step, "question": question, "answer": answer}) + "\n"
        for question, answer in asked
    ]
    with storing(run_dir / SAMPLES), (run_dir / SAMPLES).open("a", encoding="utf-8") as file:
        file.write("".join(lines))


def read_samples(run_dir: Path) -> list[dict[str, Any]]:
    """Return what :func:`note_samples` wrote, in order; of steps that a resumed run did again, the last answer."""
    return list({(s["step"], s["question"]): s for s in read_metrics(run_dir / SAMPLES)}.values())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl or samples.jsonl; a last one that was cut off by a crash is left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def draw_loss(run_dir: Path, kind: RowKind) -> Path | None:
    """Draw loss.png from metrics.jsonl: training loss of each step, its running mean, validation loss.

    ``kind`` is what the run's rows are: it says what the loss is a mean of.
    """
    from matplotlib.figure import Figure

    metrics = read_metrics(run_dir / "metrics.jsonl")
    if not metrics:
        return None
    steps = [m["step"] for m in metrics]
    losses = [m["loss"] for m in metrics]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="#9db8d9", linewidth=1, label="training, each step")
    axes.plot(steps, running_mean(losses), color="#1f4e8c", linewidth=2, label="training, running mean")
    validation = [(m["step"], m["validation_loss"]) for m in metrics if "validation_loss" in m]
    if validation:
        axes.plot(
            *zip(*validation, strict=True), color="#c25b1a", marker="o", linewidth=2, label="validation"
        )
    axes.set(xlabel="step", ylabel=f"loss ({LOSS_IS[kind]})", title=run_dir.name)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    target = run_dir / "loss.png"
    write_whole(target, lambda file: figure.savefig(file, format="png"))
    return target


def running_mean(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Return the exponential mean of ``values``, without the pull towards 0 at the start."""
    means, mean, total = [], 0.0, 0.0
    for value in values:
        mean, total = weight * mean + (1 - weight) * value, weight * total + (1 - weight)
        means.append(mean / total)
    return means


def check_trackers(names: Sequence[str]) -> None:
    """Raise MissingExtraError for a tracker whose package is not installed."""
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in available:
            raise MissingExtraError(f"run.trackers={name}", name, name)


class Trackers:
    """TensorBoard, trackio, wandb and MLflow, through accelerate's tracker classes."""

    def __init__(self, names: Sequence[str], run_dir: Path, settings: dict[str, Any]) -> None:
        """Start every tracker of ``names`` and give it the run's settings; see :func:`check_trackers`."""
        self._trackers: list[Any] = []
        if not names:
            return
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # the tracker classes ask it whether this is the main process
        flat = {
            f"{section}.{key}": value if isinstance(value, (int, float, str, bool)) else str(value)
            for section, values in settings.items()
            for key, value in values.items()
        }
        for name in names:
            tracker_class = LOGGER_TYPE_TO_CLASS[name]
            if tracker_class.requires_logging_directory:
                tracker = tracker_class(run_dir.name, logging_dir=str(run_dir / "trackers"))
            else:
                tracker = tracker_class(run_dir.name)
            if hasattr(tracker, "start"):
                tracker.start()
            tracker.store_init_configuration(flat)
            self._trackers.append(tracker)

    def log(self, report: StepReport) -> None:
        metrics = {
            key: value
            for key, value in as_metrics(report).items()
            if key not in ("step", "num_steps", "memory_note")
        }
        for tracker in self._trackers:
            tracker.log(metrics, step=report.step)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()
