"""``lorasmith runs``: what was trained on this machine."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from lorasmith.cli.console import console


def command(
    root: Annotated[Path, typer.Argument(help="Folder that holds the runs.")] = Path("runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """List the runs under a folder, the newest first."""
    from lorasmith.errors import RunError
    from lorasmith.model.run_record import describe_run, list_runs

    if not root.exists() and not as_json:
        console.print(f"There are no runs yet in {escape(str(root))}. Train one: [bold]lorasmith demo[/]")
        return
    found = list_runs(root) if root.exists() else []
    runs = [
        {"folder": str(folder), "state": "broken", "fault": str(record)}
        if isinstance(record, RunError)
        else describe_run(folder, record)
        for folder, record in found
    ]
    if as_json:
        print(json.dumps(runs, indent=2))
    elif runs:
        _print_table(runs)
    else:
        console.print(f"There are no runs yet in {escape(str(root))}. Train one: [bold]lorasmith demo[/]")


def _print_table(runs: list[dict[str, Any]]) -> None:
    table = Table("run", "base", "data", box=None, pad_edge=False)
    table.add_column("examples", justify="right")
    table.add_column("loss", justify="right")
    table.add_column("when")
    table.add_column("state")
    colours = {
        "finished": "green",
        "training": "cyan",
        "stopped": "yellow",
        "started": "yellow",
        "broken": "red",
    }
    for run in runs:
        loss, count = run.get("final_loss"), run.get("num_examples")
        table.add_row(
            f"[bold]{escape(run['folder'])}[/]",
            escape(_short(run.get("base"))),
            escape(_short(run.get("data"))),
            "" if count is None else f"{count:,}",
            "" if loss is None else f"{loss:.3f}",
            _ago(run.get("created")),
            f"[{colours[run['state']]}]{run['state']}[/]",
        )
    console.print(table)
    for run in runs:
        if "fault" in run:
            console.print(f"[red]{escape(run['fault'])}[/]", soft_wrap=True)
    if any(run["state"] == "stopped" for run in runs):
        console.print("A stopped run goes on when it is trained again under its name.")


def _short(text: str | None) -> str:
    """Return the last part of a path; Hub ids and names stay whole."""
    if not text:
        return ""
    return Path(text).name if Path(text).is_absolute() or text.count("/") > 1 else text


def _ago(created: str | None) -> str:
    if created is None:
        return ""
    minutes = (datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds() / 60
    if minutes < 1.5:
        return "just now"
    if minutes < 90:
        return f"{minutes:.0f} minutes ago"
    if minutes < 36 * 60:
        return f"{minutes / 60:.0f} hours ago"
    return created[:10]
