"""``lorasmith push``: a run's adapter, a proven merge of it or its data on the Hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from lorasmith.cli.console import console, tell
from lorasmith.errors import SettingsError

if TYPE_CHECKING:
    from lorasmith.export.push import Parcel


def command(
    run: Annotated[Path, typer.Option(help="Run folder.", show_default=False)],
    to: Annotated[str, typer.Option(help="Place on the Hub: OWNER/NAME.", show_default=False)],
    merged: Annotated[
        Path | None,
        typer.Option(help="Push this merge of the run in place of its adapter; it must be proven."),
    ] = None,
    data: Annotated[
        bool, typer.Option("--data", help="Push the run's training data, as a data set.")
    ] = False,
    public: Annotated[
        bool, typer.Option("--public/--private", help="Whether everybody may see a new repository.")
    ] = False,
    license: Annotated[
        str | None, typer.Option(help="Licence for the card, as the Hub writes it: apache-2.0, mit, ...")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List every file and its size, and send nothing.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Add to a repository that lorasmith did not make.")
    ] = False,
    despite_findings: Annotated[
        bool,
        typer.Option("--despite-findings", help="Push although keys or e-mail addresses were found."),
    ] = False,
) -> None:
    """Push a run to the Hub, with a card made from what was recorded and measured. Private unless told otherwise.

    Keys and e-mail addresses in the files and in the training data are shown first, and stop it.
    """
    if data and merged:
        raise SettingsError("--data and --merged are two pushes: run lorasmith push twice.")
    from lorasmith.export.push import prepare, refuse_findings, send

    with prepare(run, to, merged=merged, data=data, license=license) as parcel:
        _print_parcel(parcel, to, public)
        if dry_run:
            for finding in parcel.findings:
                console.print(f"[yellow]Found[/] {escape(str(finding))}", soft_wrap=True)
            console.print("Nothing was sent (--dry-run).")
            return
        if not despite_findings:
            refuse_findings(parcel)
        pushed = send(
            parcel,
            to,
            is_public=public,
            overwrite=overwrite,
            tell=tell,
        )
    console.print(
        f"[green]Pushed[/] to [bold]{escape(pushed.url)}[/] (commit {pushed.commit[:12]}); every file arrived whole.",
        soft_wrap=True,
    )
    if not data:
        console.print(f'Next: [bold]lorasmith ask "your question" --run {escape(to)}[/]', soft_wrap=True)


def _print_parcel(parcel: "Parcel", to: str, is_public: bool) -> None:
    table = Table("file", "bytes", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, size in parcel.files:
        table.add_row(escape(name), f"{size:,}")
    who = "public" if is_public else "private"
    console.print(f"The {parcel.title} for [bold]{escape(to)}[/] ({who} if new):", soft_wrap=True)
    console.print(table)
    console.print(f"{len(parcel.files)} files, {decimal(parcel.num_bytes)}")
