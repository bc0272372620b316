"""``lorasmith demo``: the whole road on the handbook example, with what was measured at every station."""

import shutil
import sys
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from lorasmith.cli.console import console, tell
from lorasmith.cli.report import make_page
from lorasmith.errors import RunError

if TYPE_CHECKING:
    from lorasmith.generation.chat import Chat

# Asked before and after, on screen: one of each kind of question.
SHOWN = (
    "When will I receive my paycheck?",
    "how long is a work cycle and how many are there per year",
    "I keep forgetting the end-of-day check-in. What is the least I should do?",
)
MAX_ANSWER_TOKENS = 80  # of the shown answers; the handbook's longest has 75


def command(
    out: Annotated[Path, typer.Option(help="Folder for the merged model.")] = Path("merged/handbook"),
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Override the example's settings."),
    ] = None,
) -> None:
    """Teach the built-in base a company's handbook: check, ask, train, ask again, merge with proof, report.

    Takes about twenty minutes on two slow cores. Started again, it goes on where it was stopped.
    """
    started = time.monotonic()
    examples = find_examples()
    train_file = examples / "handbook" / "handbook_train.json"

    from lorasmith.cli.run_file import load_run_file
    from lorasmith.cli.train import EXIT_STOPPED, choose_run_dir, train_run

    run_file = load_run_file(examples / "handbook.yaml", settings or ())
    run_dir = choose_run_dir(run_file)

    _station(1, "Check the data", f"lorasmith check {train_file}")
    from lorasmith.cli import check

    check.command(str(train_file), model=run_file.base.model, max_seq_len=run_file.data.max_seq_len)

    _station(2, "Ask the base, before", f'lorasmith ask "{SHOWN[0]}" --run {run_file.base.model}')
    before = _ask_base(run_file.base.model)

    _station(3, "Train", f"lorasmith train {examples / 'handbook.yaml'}")
    if not train_run(run_file, run_dir):
        console.print("Stopped and saved. Go on with: [bold]lorasmith demo[/]")
        raise typer.Exit(EXIT_STOPPED)

    _station(4, "Ask the tuned model, after", f'lorasmith ask "{SHOWN[0]}" --run {run_dir}')
    from lorasmith.generation.chat import Chat

    _show_answers(before, _ask_shown(Chat.from_run(run_dir)))

    _station(5, "Merge, and prove it", f"lorasmith merge --run {run_dir} --out {out}")
    from lorasmith.cli import merge as merge_command

    if (out / "merge_proof.json").is_file():
        console.print(
            f"{escape(str(out))} is there already, from an earlier demo: merged again.", soft_wrap=True
        )
    merge_command.command(run=run_dir, out=out, overwrite=True)

    _station(6, "Report", f"lorasmith report --run {run_dir}")
    make_page(run_dir, run_file.report)
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    console.print(
        f"The whole road took {minutes} min {seconds} s.",
    )
    console.print("\n[bold]What next[/]")
    if shutil.which("lorasmith") is None:  # make demo runs it by its path
        console.print(
            f"  first, in this shell  source {escape(str(Path(sys.executable).parent / 'activate'))}",
            soft_wrap=True,
        )
    console.print(f"  talk with it          lorasmith chat --run {escape(str(run_dir))}", soft_wrap=True)
    console.print(
        f"  compare with the base lorasmith chat --run {escape(str(run_dir))} --compare", soft_wrap=True
    )
    console.print("  your own data         lorasmith init my-team", soft_wrap=True)


def find_examples() -> Path:
    """Return the folder examples/ of this clone, relative to here if that is shorter.

    Raises:
        RunError: lorasmith was installed without its clone.
    """
    here = Path("examples")
    if (here / "handbook.yaml").is_file():
        return here
    clone = Path(__file__).resolve().parents[3] / "examples"
    if (clone / "handbook.yaml").is_file():
        return clone
    raise RunError(
        "The demo needs the folder examples/ of a clone of lorasmith, which is not here. "
        "Run it inside the clone, or start with your own data: lorasmith init my-team"
    )


def _station(number: int, title: str, as_command: str | None) -> None:
    console.print()
    console.rule(f"[bold]{number} of 6  {title}[/]", align="left")
    if as_command:
        console.print(f"[dim]$ {escape(as_command)}[/]", soft_wrap=True)


def _ask_base(model: str) -> list[str]:
    """Ask the untuned base the shown questions."""
    from lorasmith.generation.chat import open_chat

    chat = open_chat(model, tell=tell)
    answers = _ask_shown(chat)
    for question, answer in zip(SHOWN, answers, strict=True):
        console.print(f"[bold]{escape(question)}[/]\n  {escape(answer)}", soft_wrap=True)
    return answers


def _ask_shown(chat: "Chat") -> list[str]:
    from lorasmith.generation.sampling import SamplingSettings

    answers = chat.ask_many(list(SHOWN), sampling=SamplingSettings(max_tokens=MAX_ANSWER_TOKENS))
    return [" ".join(answer.text.split()) for answer in answers]


def _show_answers(before: list[str], after: list[str]) -> None:
    table = Table(show_lines=True, title="Before and after", title_justify="left")
    for heading in ("question", "base", "tuned"):
        table.add_column(heading, ratio=1)
    for question, base, tuned in zip(SHOWN, before, after, strict=True):
        table.add_row(escape(question), f"[dim]{escape(_shorten(base))}[/]", escape(_shorten(tuned)))
    console.print(table)


def _shorten(answer: str) -> str:
    """Return the beginning of a long answer: the base's run on until they are cut."""
    return textwrap.shorten(answer, 240, placeholder=" ...")
