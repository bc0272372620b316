"""Several runs side by side: what each was found to be, which is best, and how sure that is.

Read from what the runs themselves wrote, run.json and report.json, so nothing is asked twice.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorasmith.errors import RunError
from lorasmith.evaluation.settings import ReportSettings
from lorasmith.evaluation.statistics import Comparison, Count
from lorasmith.files import digest, write_whole
from lorasmith.model.run_record import read_run_record

HEADER = ("method", "rate", "loss", "right", "stop", "general", "text", "trained", "MiB", "GiB", "s")
LEGEND = (
    "rate: highest learning rate. loss: nats a token on the held-out answers. right: held-out answers that are right. "
    "stop: answers that end by themselves. general: general questions right, before and after. text: perplexity on a "
    "general text, as a multiple of the untuned base's. trained: numbers that are trained. MiB: saved on disk. GiB: "
    "memory at the training's peak. s: seconds of the training steps."
)
_CLEARLY_LESS = 0.8  # of what the best run takes
UNTUNED = "untuned base"


@dataclass(frozen=True, slots=True)
class Entry:
    """One run of the comparison. ``is_right`` is of the same questions in the same order in each."""

    name: str
    method: str
    learning_rate: float
    loss: float  # nats a token of the held-out answers
    asked: str  # sha256 of the held-out questions and their references
    is_right: tuple[bool, ...]  # each held-out answer
    stopped: Count
    num_general: tuple[int, int]  # general questions answered right: by the untuned base, and now
    text_ratio: float  # perplexity on a general text, as a multiple of the base's
    num_trained: int
    saved_bytes: int
    peak_bytes: int
    seconds: float  # of the steps, without validation and saving
    num_tokens: int  # computed: shared prefixes counted once

    @property
    def right(self) -> Count:
        return Count(sum(self.is_right), len(self.is_right))

    def cells(self) -> tuple[str, ...]:
        """Return the row under HEADER."""
        before, after = self.num_general
        return (
            self.name,
            f"{self.learning_rate:.2g}",
            f"{self.loss:.3f}",
            f"{self.right.k} of {self.right.n}",
            f"{100 * self.stopped.share:.0f}%",
            f"{before}, {after}",
            f"{self.text_ratio:.2f}",
            f"{self.num_trained:,}" if self.num_trained < 100_000 else f"{self.num_trained / 1e6:.2f}M",
            f"{self.saved_bytes / 2**20:,.1f}",
            f"{self.peak_bytes / 2**30:.2f}",
            f"{self.seconds:,.0f}",
        )


@dataclass(frozen=True, slots=True)
class Untuned:
    """What the runs began as, asked the same."""

    loss: float
    is_right: tuple[bool, ...]

    @property
    def right(self) -> Count:
        return Count(sum(self.is_right), len(self.is_right))

    def cells(self) -> tuple[str, ...]:
        return (
            UNTUNED,
            "",
            f"{self.loss:.3f}",
            f"{self.right.k} of {self.right.n}",
            *[""] * (len(HEADER) - 4),
        )


def read_entry(name: str, run_dir: Path) -> tuple[Entry, Untuned]:
    """Return what a finished run and its report say, and what its base was.

    Raises:
        RunError: the run is unfinished or has no report, or nothing was held out.
    """
    record = read_run_record(run_dir)
    if record.result is None:
        raise RunError(f"The run {run_dir} has not been trained to its end. Start the comparison again.")
    report = _read_report(run_dir)
    held_out, probe, result = report["held_out"], report["probe"], record.result
    compared = probe["compared"]
    texts = [probe[side]["loss"] for side in ("base_text", "tuned_text")]
    asked = [(answer["question"], answer["reference"]) for answer in held_out["tuned"]["records"]]
    entry = Entry(
        name=name,
        method=record.settings["method"]["name"],
        learning_rate=max(step["learning_rate"] for step in report["metrics"]),
        loss=held_out["tuned_surprise"]["loss"],
        asked=digest(asked),
        is_right=_is_right(held_out["tuned"]),
        stopped=Count(**held_out["tuned"]["stopped"]),
        num_general=(compared["both"] + compared["lost"], compared["both"] + compared["gained"]),
        text_ratio=math.exp(min(700.0, texts[1] - texts[0])),
        num_trained=result["trainable_numbers"],
        saved_bytes=result["saved_bytes"],
        peak_bytes=result["peak_bytes"],
        seconds=result["training_seconds"],
        num_tokens=result["tokens"],
    )
    return entry, Untuned(held_out["base_surprise"]["loss"], _is_right(held_out["base"]))


def check_asked_alike(first: Entry, entry: Entry) -> None:
    """Raise RunError where two runs were asked different questions: a held-out file has changed in between."""
    if first.asked != entry.asked:
        raise RunError(
            f"{entry.name} was asked other questions than {first.name}, so they cannot be compared: the held-out data "
            "has changed in between. Make the older report again: lorasmith report --run RUN."
        )


def rank(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries, the best first: by right held-out answers, and by the loss on them where these are equal."""
    return sorted(entries, key=lambda entry: (-entry.right.k, entry.loss))


def tell_best(ranked: Sequence[Entry], untuned: Untuned) -> list[str]:
    """Return which run is best in plain sentences, and what the questions are too few to tell.

    Runs are compared pair by pair by McNemar's exact test at 5%; of many pairs, some will differ by chance.
    """
    limits = ReportSettings()
    best, others = ranked[0], ranked[1:]
    lines = [
        f"Best: {best.name}, with {best.right} of the held-out answers right and a loss of {best.loss:.3f}."
    ]
    if Comparison.of(untuned.is_right, best.is_right).outcome(limits.significance) != "better":
        lines.append(f"It is not clearly better than the untuned base, which has {untuned.right} right.")
    outcomes = {e.name: Comparison.of(e.is_right, best.is_right).outcome(limits.significance) for e in others}
    worse = [name for name, outcome in outcomes.items() if outcome == "better"]
    alike = [entry for entry in others if entry.name not in worse]
    if worse:
        lines.append(f"It is clearly better than {_listed(worse)}.")
    if alike:
        names = _listed([entry.name for entry in alike])
        lines.append(f"{best.right.n} questions are too few to tell it from {names}.")
        lines += _cheaper_than(best, alike)
    if best.stopped.share < limits.reject_stopped:
        lines.append(f"But only {best.stopped} of its answers end by themselves: train it longer.")
    before, after = best.num_general
    if before and 1 - after / before > limits.ship_forgotten:
        lines.append(
            f"But it forgets: of the general questions {before} were answered right before, {after} after."
        )
    full = next((entry for entry in ranked if entry.method == "full"), None)
    lora = next((entry for entry in ranked if entry.method == "lora"), None)
    if full is not None and lora is not None and full.right.k:
        lines.append(f"LoRA reaches {lora.right.k / full.right.k:.0%} of full fine-tuning's right answers.")
    return lines


def write_comparison(folder: Path, ranked: Sequence[Entry], untuned: Untuned, faults: dict[str, str]) -> None:
    """Write comparison.json, comparison.md and comparison.png into ``folder``; ``faults`` are of runs that failed."""
    values = {
        "runs": [{**asdict(entry), "right": asdict(entry.right)} for entry in ranked],
        "untuned": {**asdict(untuned), "right": asdict(untuned.right)},
        "failed": faults,
        "in_words": tell_best(ranked, untuned),
    }
    write_whole(folder / "comparison.json", json.dumps(values, indent=2, allow_nan=False) + "\n")
    rows = [HEADER, ("---",) * len(HEADER), *(row.cells() for row in (*ranked, untuned))]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", LEGEND, "", *tell_best(ranked, untuned)]
    lines += [f"{name} failed: {fault}" for name, fault in faults.items()]
    write_whole(folder / "comparison.md", "\n".join(lines) + "\n")
    _draw(folder / "comparison.png", ranked, untuned)


def _draw(target: Path, ranked: Sequence[Entry], untuned: Untuned) -> None:
    """Draw right answers with their 95% intervals, the loss, and the seconds, a line for each run."""
    from matplotlib.figure import Figure

    names = [entry.name for entry in ranked]
    figure = Figure(figsize=(11, 1.6 + 0.36 * len(ranked)), dpi=120, layout="constrained")
    right, loss, seconds = figure.subplots(1, 3, sharey=True, width_ratios=(3, 2, 2))
    shares = [100 * entry.right.share for entry in ranked]
    bounds = [[100 * bound for bound in entry.right.interval()] for entry in ranked]
    right.barh(names, shares, color="#9db8d9")
    right.errorbar(
        shares,
        names,
        xerr=[
            [share - low for share, (low, _) in zip(shares, bounds, strict=True)],
            [high - share for share, (_, high) in zip(shares, bounds, strict=True)],
        ],
        fmt="none",
        ecolor="#1f4e8c",
        capsize=3,
    )
    right.set(xlabel="held-out answers right, % (95% interval)", xlim=(0, 100))
    loss.barh(names, [entry.loss for entry in ranked], color="#c9d9ec")
    loss.set(xlabel="loss on them (nats a token)")
    seconds.barh(names, [entry.seconds for entry in ranked], color="#d9c3ae")
    seconds.set(xlabel="seconds of training")
    for axes, value in ((right, 100 * untuned.right.share), (loss, untuned.loss)):
        axes.axvline(value, color="#c25b1a", linestyle="--", linewidth=1, label=UNTUNED)
    right.legend(frameon=False, loc="lower right")
    right.invert_yaxis()
    for axes in (right, loss, seconds):
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    write_whole(target, lambda file: figure.savefig(file, format="png"))


def _cheaper_than(best: Entry, alike: Sequence[Entry]) -> list[str]:
    """Return a sentence for each price at which a run that may be as good is clearly cheaper."""
    lines = []
    for price, what, told in (
        ("saved_bytes", "room on disk", lambda e: f"{e.saved_bytes / 2**20:,.1f} MiB"),
        ("peak_bytes", "memory", lambda e: f"{e.peak_bytes / 2**30:.2f} GiB"),
        ("seconds", "time", lambda e: f"{e.seconds:,.0f} s"),
    ):
        least = min(alike, key=lambda entry: getattr(entry, price))
        if getattr(least, price) < _CLEARLY_LESS * getattr(best, price) and told(least) != told(best):
            lines.append(
                f"Of these {least.name} takes the least {what}: {told(least)}, where {best.name} takes {told(best)}."
            )
    return lines


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _is_right(side: dict[str, Any]) -> tuple[bool, ...]:
    return tuple(answer["is_right"] for answer in side["records"])


def _read_report(run_dir: Path) -> dict[str, Any]:
    from lorasmith.evaluation.report import REPORT_FILE

    file = run_dir / REPORT_FILE
    if not file.is_file():
        raise RunError(f"The run {run_dir} has no report. Make it: lorasmith report --run {run_dir}")
    report = json.loads(file.read_text(encoding="utf-8"))
    if report["held_out"] is None:
        told = " ".join(report["notes"]) or "Nothing was held out."
        raise RunError(f"The run {run_dir} was asked nothing that it was not trained on. {told}")
    return report
