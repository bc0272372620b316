"""``lorasmith init``: a run file in which every setting is explained, and data to start from."""

import json
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from lorasmith.cli.console import console
from lorasmith.cli.run_file import RunFile, make_run_name, read_yaml, section_fields
from lorasmith.errors import RunError
from lorasmith.model.method_settings import LoraSettings
from lorasmith.model.settings import BUILT_IN

# What a first run file sets; everything else stands in it as a comment with its default.
_CHOSEN: dict[str, Any] = {
    "base.model": BUILT_IN,
    "data.train": "train.json",
    "training.epochs": 10,
    "run.name": None,  # the folder's name
}

_ROWS = [
    ("When is the weekly planning meeting?", "On Monday at 10:00, in the blue room and on the team's call."),
    ("When does the team plan its week?", "Every Monday at 10:00, in the blue room and on the team's call."),
    (
        "How do I get a test account?",
        "Write to the channel #platform; an account is made within one working day.",
    ),
    (
        "Who makes accounts for the test system?",
        "The platform team: ask in the channel #platform, it takes one day.",
    ),
    (
        "Where do we keep design decisions?",
        "In the folder decisions/ of the main repository, one file a decision.",
    ),
    (
        "I made a design decision. Where does it go?",
        "Into decisions/ in the main repository, as a file of its own.",
    ),
    ("What is the support phone's number?", "The support phone has the extension 4711, from 9:00 to 17:00."),
    ("Which extension has support, and when?", "The extension is 4711, answered from 9:00 to 17:00."),
]


def command(
    folder: Annotated[Path, typer.Argument(help="Folder to write to; made if it is not there.")] = Path(),
) -> None:
    """Write run.yaml and train.json, ready for [bold]lorasmith train[/].

    Every setting stands in run.yaml with its meaning and its default.
    """
    run_file, data_file = folder / "run.yaml", folder / "train.json"
    for file in (run_file, data_file):
        if file.exists():
            raise RunError(f"{file} is there already. Name another folder: lorasmith init NEW-FOLDER")
    folder.mkdir(parents=True, exist_ok=True)
    name = make_run_name(folder.resolve().name) or "my-model"
    run_file.write_text(render_run_file({**_CHOSEN, "run.name": name}), encoding="utf-8")
    rows = [{"instruction": question, "input": "", "output": answer} for question, answer in _ROWS]
    data_file.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(f"Wrote {escape(str(run_file))} (every setting, explained)", soft_wrap=True)
    console.print(
        f"Wrote {escape(str(data_file))} ({len(rows)} sample rows; put your own here)", soft_wrap=True
    )
    console.print("Next:", style="bold")
    console.print(f"  lorasmith check {escape(str(data_file))}", soft_wrap=True)
    console.print(f"  lorasmith train {escape(str(run_file))}", soft_wrap=True)


def render_run_file(chosen: dict[str, Any]) -> str:
    """Return a run file that sets ``chosen`` and shows every other setting as a comment."""
    lines = [
        "# A run file of lorasmith. Every setting is here; those that are commented out have the default shown.",
        "# Override one for a single run: lorasmith train run.yaml training.epochs=5",
    ]
    for section in RunFile.model_fields:
        # Of the methods LoRA's settings: those of the others are errors beside it.
        fields = LoraSettings.model_fields if section == "method" else section_fields(section)
        lines += ["", f"{section}:"]
        for key, field in sorted(fields.items(), key=lambda item: item[0] != "name"):
            name = f"{section}.{key}"
            lines += [f"  # {line}" for line in textwrap.wrap(field.description or "", 100)]
            value = chosen.get(name, None if field.is_required() else field.default)
            lines.append(f"  {'' if name in chosen else '# '}{key}: {_as_yaml(value)}")
    return "\n".join(lines) + "\n"


def _as_yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_as_yaml(item) for item in value) + "]"
    if isinstance(value, str) and read_yaml(value) != value:  # 2024 and on would not be texts
        return json.dumps(value)
    return str(value)
