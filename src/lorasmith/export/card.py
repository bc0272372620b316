"""README.md of a run folder: a model card of what was recorded and measured, and of nothing else."""

import json
from pathlib import Path
from typing import Any

from lorasmith.files import write_whole
from lorasmith.model.run_record import RunRecord, read_run_record

NOT_MEASURED = """\
The losses above are all that was measured here. Whether the answers are right was not, nor what the model forgot:
`lorasmith report --run .` asks. It can be wrong with confidence, and it repeats what its data and its base contain."""


def write_card(run_dir: Path) -> None:
    """Write README.md into ``run_dir`` from its run.json, and from its report.json where there is one.

    Raises:
        RunError: ``run_dir`` is not a run.
    """
    report = _read_report(run_dir / "report.json")
    write_whole(run_dir / "README.md", make_card(read_run_record(run_dir), report))


def make_card(record: RunRecord, report: dict[str, Any] | None = None) -> str:
    """Return the card as Markdown, with the front matter that the Hub reads.

    ``report`` is the content of report.json: the facts of report.html, told once more.
    """
    is_on_hub = record.base.revision is not None
    front = ["library_name: peft", *([f"base_model: {record.base.id}"] if is_on_hub else [])]
    front += ["tags:", "  - lora", "  - lorasmith"]
    stop = ", ".join(f"`{text}`" for text in record.recipe.get("stop", ()))
    stop = f" and stops at {stop}" if stop else ""
    versions = ", ".join(f"{name} {number}" for name, number in record.versions.items())
    measured = _measured(report) if report else f"## What is not known\n\n{NOT_MEASURED}"
    return f"""---
{chr(10).join(front)}
---

# {record.name}

A LoRA adapter for {record.base.id}, trained with lorasmith. {_state(record)}

{_table(("", ""), _facts(record))}

{measured}

## Use

    lorasmith ask "your question" --run .
    lorasmith merge --run . --out merged

`adapter/` is a plain PEFT folder: `PeftModel.from_pretrained(base, "adapter")` opens it. It was trained with the
prompt recipe `{record.recipe.get("name", "unknown")}`{stop}; asked in another form it answers worse. `run.json`
holds the recipe, every setting and the fingerprints of base and data.

Made with {versions}.
"""


def _measured(report: dict[str, Any]) -> str:
    """Return the verdict, its reasons and the counts of a report."""
    verdict, held_out, probe = report["verdict"], report["held_out"], report["probe"]
    reasons = "\n".join(
        f"- **{reason['about']}** ({reason['level']}): {reason['text']}" for reason in verdict["reasons"]
    )
    rows: list[tuple[str, ...]] = []
    if held_out:
        sides = [held_out["base"], held_out["tuned"], held_out["merged"]]
        rows.append(("right answers, held-out questions", *(_count(side, "right") for side in sides)))
        rows.append(("ended by themselves", *(_count(side, "stopped") for side in sides)))
        surprises = [_perplexity(held_out[f"{name}_surprise"]) for name in ("base", "tuned")]
        rows.append(("perplexity of the reference answers", *surprises, "-"))
    if report["trained"]:
        rows.append(("right answers, training questions", "-", _count(report["trained"], "right"), "-"))
    rows.append(
        ("right answers, general questions", *(_count(probe[s], "right") for s in ("base", "tuned")), "-")
    )
    texts = [_perplexity(probe[f"{name}_text"]) for name in ("base", "tuned")]
    rows.append(("perplexity of general text", *texts, "-"))
    notes = "".join(f"\n**Note:** {note}\n" for note in report["notes"])
    return f"""## Verdict

**{verdict["sentence"]}**

{reasons}

{_table(("", "base", "tuned", "merged"), rows)}
{notes}
Every question with its answers, the curves and the thresholds: `report.html`, and as plain values `report.json`. The
model can be wrong with confidence, and it repeats what its data and its base contain."""


def _count(side: dict[str, Any] | None, name: str) -> str:
    if not side:
        return "-"
    k, n = side[name]["k"], side[name]["n"]
    return f"{k} of {n}"


def _perplexity(surprise: dict[str, Any]) -> str:
    value = surprise["perplexity"]
    return "beyond all numbers" if value is None else f"{value:,.1f}"


def _read_report(file: Path) -> dict[str, Any] | None:
    """Return a report that this version wrote; anything else is as good as none."""
    try:
        report = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and report.get("schema_version") == 1 else None


def _state(record: RunRecord) -> str:
    return "" if record.result is not None else "**The training has not been finished.**"


def _facts(record: RunRecord) -> list[tuple[str, Any]]:
    result, data = record.result or {}, record.data
    method, training = record.settings.get("method", {}), record.settings.get("training", {})
    revision = f" at {record.base.revision}" if record.base.revision else ""
    rows = [
        ("Base", f"{record.base.id}{revision}"),
        ("Weights of the base (fingerprint)", f"`{record.base.fingerprint[:16]}`"),
        ("Data", data.get("source")),
        ("Examples", data.get("num_examples")),
        ("Held out for validation", data.get("num_validation") or None),
        ("Prompt recipe", record.recipe.get("name")),
        ("System prompt", record.recipe.get("system")),
        (
            "Rank, alpha",
            f"{method['r']}, {method['lora_alpha']}" if {"r", "lora_alpha"} <= method.keys() else None,
        ),
        ("Epochs", training.get("epochs")),
        ("Steps", result.get("steps")),
        ("Loss of the last step", result.get("final_loss")),
        ("Validation loss", result.get("validation_loss")),
        ("Seconds of training", result.get("training_seconds")),
        ("Norm of the update", result.get("update_norm")),
        ("Trained", record.created),
    ]
    return [(name, value) for name, value in rows if value not in (None, "")]


def _table(heading: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [heading, ("---",) * len(heading), *(tuple(_cell(value) for value in row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines).replace("|  |", "| |")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")
