"""README.md of a run folder and of a Hub repository: a card of what was recorded and measured, and of nothing else."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData, ModelCardData

from lorasmith.files import write_whole
from lorasmith.model.base import BUILT_IN_HUB_ID
from lorasmith.model.method_settings import METHODS
from lorasmith.model.run_record import RunRecord, read_run_record
from lorasmith.model.settings import BUILT_IN

# What a run of each tuning method made.
KINDS = {
    "lora": "A LoRA adapter",
    "rslora": "A rank-stabilised LoRA adapter",
    "dora": "A DoRA adapter",
    "pissa": "A LoRA adapter (started by PiSSA)",
    "olora": "A LoRA adapter (started by OLoRA)",
    "lora_plus": "A LoRA adapter (LoRA+)",
    "adalora": "An AdaLoRA adapter",
    "vera": "A VeRA adapter",
    "oft": "An OFT adapter",
    "boft": "A BOFT adapter",
    "ia3": "An IA3 adapter",
    "prompt": "Virtual tokens (prompt tuning)",
    "prefix": "Virtual tokens (prefix tuning)",
    "p_tuning": "Virtual tokens (P-tuning)",
    "full": "All weights",
}
PLAIN_LORA = ("lora", "rslora", "pissa", "olora", "lora_plus")  # what vLLM opens
# What --max-lora-rank takes; adapters above it are refused.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_DEFAULT = 16
UNMERGED = ("prompt", "prefix", "p_tuning")  # no weight to fold in

NOT_MEASURED = """\
The losses above are all that was measured here. Whether the answers are right was not, nor what the model forgot{}.
It can be wrong with confidence, and it repeats what its data and its base contain."""


def write_card(run_dir: Path) -> None:
    """Write README.md into ``run_dir`` from its run.json, and from its report.json where there is one.

    Raises:
        RunError: ``run_dir`` is not a run.
    """
    report = read_report(run_dir / "report.json")
    write_whole(run_dir / "README.md", make_card(read_run_record(run_dir), report))


def make_card(
    record: RunRecord,
    report: dict[str, Any] | None = None,
    *,
    place: str | None = None,
    is_merged: bool = False,
    has_gguf: bool = True,
    license: str | None = None,
) -> str:
    """Return the card as Markdown, with the front matter that the Hub reads.

    ``report`` is the content of report.json: the facts of report.html, told once more. ``place`` is the Hub
    repository that it describes; none: the run's own folder. ``has_gguf``: the model is one that an export can write.
    """
    method = record.settings.get("method", {}).get("name", "lora")
    is_whole = is_merged or method == "full"
    base = base_on_hub(record)
    front = ModelCardData(
        library_name="transformers" if is_whole else "peft",
        base_model=base,
        base_model_relation=(("finetune" if is_whole else "adapter") if base else None),
        pipeline_tag="text-generation",
        tags=[method, "lorasmith"],
        license=license,
    )
    what = f"{KINDS[method]}, merged into" if is_merged and method != "full" else f"{KINDS[method]} for"
    if method == "full":
        what = "All weights of"
    stop = ", ".join(f"`{text}`" for text in record.recipe.get("stop", ()))
    stop = f" and stops at {stop}" if stop else ""
    versions = ", ".join(f"{name} {number}" for name, number in record.versions.items())
    recipe = record.recipe.get("name", "unknown")
    how = (
        f"It was trained with the prompt recipe `{recipe}`{stop}; asked in another form it answers\nworse."
        if record.row_kind != "documents"
        else f"It was trained on plain texts, without a template, and is asked by the prompt recipe `{recipe}`{stop}."
    )
    if report:
        measured = _measured(report, is_here=place is None)
    else:
        missing = NOT_MEASURED.format(": `lorasmith report --run .` asks" if place is None else "")
        measured = f"## What is not known\n\n{missing}"
    use = _use_here(method) if place is None else _use_pushed(place, record, method, is_whole, has_gguf)
    holds = "lorasmith.json" if place and is_whole else "run.json"
    return f"""---
{front.to_yaml()}
---

# {record.name}

{what} {record.base.id}, trained with lorasmith. {_state(record)}

{_table(("", ""), _facts(record))}

{measured}

## Use

{use}

{how} `{holds}` holds the recipe, and lorasmith asks by it.

Made with {versions}.
"""


def make_data_card(record: RunRecord, files: Sequence[str], license: str | None = None) -> str:
    """Return the card of a run's training data as a data set of the Hub."""
    configs = [{"config_name": "default", "data_files": [{"split": "train", "path": list(files)}]}]
    front = DatasetCardData(
        task_categories=["text-generation"], tags=["lorasmith"], license=license, configs=configs
    )
    return f"""---
{front.to_yaml()}
---

# {record.name}

The training data of the lorasmith run {record.name}: {record.data.get("num_examples", "unknown"):,} examples.

{_table(("", ""), [("File", name) for name in files])}
"""


def base_on_hub(record: RunRecord) -> str | None:
    """Return the Hub's name of the model that was trained on, or None if it came from elsewhere."""
    if record.base.id == BUILT_IN:
        return BUILT_IN_HUB_ID
    return record.base.id if record.base.revision else None


def _use_here(method: str) -> str:
    opened = (
        "`model/` is a plain transformers folder."
        if method == "full"
        else '`adapter/` is a plain PEFT folder: `PeftModel.from_pretrained(base, "adapter")` opens it.'
    )
    merge = "" if method in (*UNMERGED, "full") else "    lorasmith merge --run . --out merged\n"
    return f"""    lorasmith ask "your question" --run .
{merge}
{opened}"""


def _use_pushed(place: str, record: RunRecord, method: str, is_whole: bool, has_gguf: bool) -> str:
    name = place.split("/")[-1]
    lines = [f'lorasmith ask "your question" --run {place}']
    if method not in UNMERGED and has_gguf:
        lines += [f"lorasmith export --run {place} --to ollama --out {name}"]
    base = base_on_hub(record)
    if is_whole:
        lines += [f"vllm serve {place}"]
    elif base and method in PLAIN_LORA:
        # What starts inside the base is saved with twice the rank (model/adapter.py).
        rank = record.settings["method"]["r"] * (2 if METHODS[method]().changes_base else 1)
        if room := next((room for room in VLLM_RANKS if room >= max(rank, _VLLM_DEFAULT)), None):
            more = f" --max-lora-rank {room}" if room > _VLLM_DEFAULT else ""
            lines += [f"vllm serve {base} --enable-lora{more} --lora-modules {name}={place}"]
    terminal = "\n".join(f"    {line}" for line in lines)
    opening = (
        f"""    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained("{place}")"""
        if is_whole
        else f"""    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    base = AutoModelForCausalLM.from_pretrained("{base or record.base.id}")
    model = PeftModel.from_pretrained(base, "{place}")"""
    )
    return f"""{terminal}

In Python:

{opening}"""


def _measured(report: dict[str, Any], *, is_here: bool) -> str:
    """Return the verdict, its reasons and the counts of a report; ``is_here``: its page lies beside the card."""
    verdict, held_out, probe = report["verdict"], report["held_out"], report["probe"]
    reasons = "\n".join(
        f"- **{reason['about']}** ({reason['level']}): {reason['text']}" for reason in verdict["reasons"]
    )
    rows: list[tuple[str, ...]] = []
    if text := report.get("text"):
        rows.append(("perplexity of held-out text", *(_perplexity(text[s]) for s in ("base", "tuned")), "-"))
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
    beside = (
        "Every question with its answers, the curves and the thresholds: `report.html`, and as plain values "
        "`report.json`.\n"
        if is_here
        else ""
    )
    return f"""## Verdict

**{verdict["sentence"]}**

{reasons}

{_table(("", "base", "tuned", "merged"), rows)}
{notes}
{beside}The model can be wrong with confidence, and it repeats what its data and its base contain."""


def _count(side: dict[str, Any] | None, name: str) -> str:
    if not side:
        return "-"
    k, n = side[name]["k"], side[name]["n"]
    return f"{k} of {n}"


def _perplexity(surprise: dict[str, Any]) -> str:
    value = surprise["perplexity"]
    return "beyond all numbers" if value is None else f"{value:,.1f}"


def read_report(file: Path) -> dict[str, Any] | None:
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
        ("Objective", _objective(record.settings.get("objective", {}))),
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


def _objective(settings: dict[str, Any]) -> str | None:
    """Return what was learnt, where it is not answers: the losses are its own."""
    if settings.get("name", "sft") == "sft":
        return None
    given = [f"{key} {value:g}" for key, value in settings.items() if key != "name" and value is not None]
    return ", ".join([settings["name"], *given])


def _table(heading: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [heading, ("---",) * len(heading), *(tuple(_cell(value) for value in row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines).replace("|  |", "| |")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value).replace("|", "\\|").replace("\n", " ")
