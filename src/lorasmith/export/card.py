"""README.md of a run folder: a small model card that says only what the run recorded."""

from pathlib import Path
from typing import Any

from lorasmith.files import write_whole
from lorasmith.model.run_record import RunRecord, read_run_record


def write_card(run_dir: Path) -> None:
    """Write README.md into ``run_dir`` from its run.json; what was not measured is not claimed.

    Raises:
        RunError: ``run_dir`` is not a run.
    """
    write_whole(run_dir / "README.md", make_card(read_run_record(run_dir)))


def make_card(record: RunRecord) -> str:
    """Return the card as Markdown, with the front matter that the Hub reads."""
    is_on_hub = record.base.revision is not None
    front = ["library_name: peft", *([f"base_model: {record.base.id}"] if is_on_hub else [])]
    front += ["tags:", "  - lora", "  - lorasmith"]
    rows = [(name, value) for name, value in _facts(record) if value not in (None, "")]
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
    stop = ", ".join(f"`{text}`" for text in record.recipe.get("stop", ()))
    stop = f" and stops at {stop}" if stop else ""
    versions = ", ".join(f"{name} {number}" for name, number in record.versions.items())
    return f"""---
{chr(10).join(front)}
---

# {record.name}

A LoRA adapter for {record.base.id}, trained with lorasmith. {_state(record)}

| | |
| --- | --- |
{table}

## Use

    lorasmith ask "your question" --run .
    lorasmith merge --run . --out merged

`adapter/` is a plain PEFT folder: `PeftModel.from_pretrained(base, "adapter")` opens it. It was trained with the
prompt recipe `{record.recipe.get("name", "unknown")}`{stop}; asked in another form it answers worse. `run.json`
holds the recipe, every setting and the fingerprints of base and data.

## What is not known

The losses above are all that was measured here. Whether the answers are right was not, nor what the model forgot:
ask it questions that it was not trained on before you rely on it. It can be wrong with confidence, and it repeats
what its data and its base contain.

Made with {versions}.
"""


def _state(record: RunRecord) -> str:
    return "" if record.result is not None else "**The training has not been finished.**"


def _facts(record: RunRecord) -> list[tuple[str, Any]]:
    result, data = record.result or {}, record.data
    method, training = record.settings.get("method", {}), record.settings.get("training", {})
    revision = f" at {record.base.revision}" if record.base.revision else ""
    return [
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


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")
