"""``lorasmith report``: what a run was like before and after, as one page, plain values and a model card."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from lorasmith.cli.asking import asking_progress
from lorasmith.cli.console import console, tell
from lorasmith.cli.run_file import override_report
from lorasmith.data.settings import RowKind
from lorasmith.evaluation.settings import ReportSettings

if TYPE_CHECKING:
    from lorasmith.evaluation.report import Report

_LOOKS = {"ship": "bold green", "good": "green", "look closer": "yellow", "do not ship": "bold red"}


def command(
    run: Annotated[Path, typer.Option(help="Folder of a finished run.", show_default=False)],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[report.KEY=VALUE]...",
            help="Override the run file's section report, such as report.ship_right=0.9.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Held-out questions with their answers: any data file. May be given several times."
        ),
    ] = None,
    merged: Annotated[
        Path | None, typer.Option(help="Folder of the merged model. Default: where it was last merged to.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Where the base model lies now, if it was moved.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
) -> None:
    """Ask the base, the tuned and the merged model, and say whether the tuned one is fit to be used.

    Writes report.html (open it in a browser; it needs no network), report.json and README.md into the run folder.
    Without held-out questions it says what is missing. What was asked before is not asked again.
    """
    from lorasmith.model.run_record import read_run_record

    recorded = read_run_record(run).settings.get("report", {})
    if data:
        recorded = {**recorded, "data": data}
    make_page(run, override_report(recorded, settings or ()), merged=merged, base=base, device=device)


def make_page(
    run_dir: Path,
    settings: ReportSettings,
    *,
    merged: Path | None = None,
    base: str | None = None,
    device: str = "auto",
) -> "Report":
    """Make the report with progress on screen, write it, and print the verdict."""
    from lorasmith.evaluation.report import make_report, write_report

    with asking_progress() as progress:
        report = make_report(
            run_dir,
            settings,
            merged=merged,
            base=base,
            device=device,
            tell=tell,
            progress=progress,
        )
        page = write_report(run_dir, report)
    print_verdict(report)
    console.print(f"Report: [bold]{escape(str(page))}[/] (open it in a browser)", soft_wrap=True)
    return report


def check_held_out(settings: ReportSettings, kind: RowKind) -> None:
    """Read the held-out files that a report will ask of a run whose rows are of ``kind``, before the training.

    Raises:
        DataError: a file cannot be read, or a row of it is wrong.
    """
    from lorasmith.evaluation.questions import read_evaluation_rows

    for name in settings.data if settings.after_training else ():
        read_evaluation_rows(name, kind)


def report_after_training(run_dir: Path, settings: ReportSettings) -> None:
    """Make the report of a run that has just ended, unless it is switched off or there; Ctrl-C leaves it out."""
    from lorasmith.evaluation.report import PAGE_FILE
    from lorasmith.model.memory import give_back_freed_memory

    page = run_dir / PAGE_FILE
    if not settings.after_training:
        return
    if page.is_file():
        console.print(f"Report: [bold]{escape(str(page))}[/]", soft_wrap=True)
        return
    give_back_freed_memory()  # of the model that was trained
    by_hand = escape(f"lorasmith report --run {run_dir}")
    console.print(
        f"\nAsking base and tuned model for the report (Ctrl-C leaves it out: {by_hand})", soft_wrap=True
    )
    try:
        make_page(run_dir, settings)
    except KeyboardInterrupt:
        console.print(
            f"The run is finished, its report is not. Make it with: [bold]{by_hand}[/]", soft_wrap=True
        )


def print_verdict(report: "Report") -> None:
    """Print the verdict's sentence and its reasons."""
    verdict = report.verdict
    console.print(f"[{_LOOKS[verdict.word]}]{escape(verdict.sentence)}[/]", soft_wrap=True)
    for reason in verdict.reasons:
        console.print(
            f"  [{_LOOKS[reason.level]}]{reason.level}[/]  {escape(reason.about)}: {escape(reason.text)}"
        )
    for note in report.notes:
        console.print(f"  [yellow]Note:[/] {escape(note)}")
