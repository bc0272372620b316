"""``lorasmith train``: a run file (or a model and data) becomes a run folder with an adapter."""

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from lorasmith.cli.console import console, tell
from lorasmith.cli.report import check_held_out, report_after_training
from lorasmith.cli.run_file import (
    RunFile,
    load_run_file,
    make_run_name,
    prepare,
    section_fields,
    setting_names,
)
from lorasmith.data.settings import ROW_WORDS, BadRowPolicy, OverlongPolicy, in_number
from lorasmith.errors import RunError, SettingsError

if TYPE_CHECKING:
    from lorasmith.training.distributed import Team
    from lorasmith.training.job import TrainingJob
    from lorasmith.training.loop import StepReport

EXIT_STOPPED = 3


def command(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN.yaml] [SECTION.KEY=VALUE]...",
            help="A run file, then settings that override it, such as training.epochs=5.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model: Hub id, folder, .gguf file; the same as base.model=.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data file, folder or Hub data set id; the same as data.train=.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Prompt recipe: auto, alpaca, chat, text, or a .jinja file; prompt.recipe=."),
    ] = None,
    max_seq_len: Annotated[
        int | None, typer.Option(help="Longest example, in tokens; data.max_seq_len=.")
    ] = None,
    overlong: Annotated[
        OverlongPolicy | None, typer.Option(help="What becomes of longer examples; data.overlong=.")
    ] = None,
    on_bad_row: Annotated[
        BadRowPolicy | None, typer.Option(help="What becomes of wrong rows; data.on_bad_row=.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run's folder; the same as run.name=.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a stopped run; refuse to start a new one.")
    ] = False,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes of this machine to train with, one for each GPU.")
    ] = 1,
    list_settings: Annotated[
        bool, typer.Option("--list-settings", help="Print every setting and end.")
    ] = False,
) -> None:
    """Train a base on your data: a LoRA adapter, or one of fourteen other methods.

    method.name chooses the method (full: all weights), objective.name what is
    learnt: answers, plain texts, pairs of answers, or labelled answers.

    A run file is made by [bold]lorasmith init[/]; without one, --data is enough: lorasmith train --data faq.json
    """
    if list_settings:
        _print_settings()
        return
    words = list(arguments or ())
    path = words.pop(0) if words and "=" not in words[0] else None
    flags = {
        "base.model": model,
        "data.train": data,
        "data.on_bad_row": on_bad_row,
        "data.overlong": overlong,
        "data.max_seq_len": max_seq_len,
        "prompt.recipe": recipe,
        "run.name": name,
    }
    words += [f"{key}={value}" for key, value in flags.items() if value is not None]
    if path is None and not words:
        raise SettingsError(
            "Nothing to train: name a run file (lorasmith init makes one), or data: lorasmith train --data FILE"
        )
    run_file = load_run_file(path, words)
    is_first = os.environ.get("RANK", "0") == "0"  # of a team; the others need not have its files
    run_dir = choose_run_dir(run_file, resume=resume and is_first)
    if is_first:
        check_held_out(run_file.report, run_file.objective.kind)
    words = ["train", *([path] if path else []), *words]
    if run_file.run.name is None:
        words.append(f"run.name={run_dir.name}")
    if processes > 1:
        sys.exit(_start(processes, words))
    if not _train_in_team(run_file, run_dir):
        console.print(f"Stopped and saved. Go on with: [bold]{escape(_again(words))}[/]", soft_wrap=True)
        sys.exit(EXIT_STOPPED)


def _again(words: list[str]) -> str:
    """Return what goes on with a stopped run, by as many processes."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "the same torchrun command"
    count = os.environ.get("WORLD_SIZE", "1")
    return shlex.join(["lorasmith", *words, *(["--processes", count] if count != "1" else [])])


def _start(processes: int, words: list[str]) -> int:
    from lorasmith.cli.processes import run_processes

    if "WORLD_SIZE" in os.environ:
        raise SettingsError(
            "torchrun has started this process: leave --processes out, torchrun says how many there are."
        )
    return run_processes(words, processes)


def _train_in_team(run_file: RunFile, run_dir: Path) -> bool:
    """Train with the processes that were started with this one, and report; return False if stopped before the end.

    The screen is the first process's; it alone writes, and tells by its exit code whether the run was stopped. On
    another machine the first says that it takes part, and that it is done.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and run_file.run.name is None:
        raise SettingsError(
            "Several processes train into one folder, and go on with it when they are started again: give the run a "
            "name with --name NAME, or run.name in the run file."
        )
    from lorasmith.training.distributed import joined

    with joined(run_file.base.device, run_file.run.lost_after_seconds) as team:
        if speaks := team.rank > 0 and team.local_rank == 0:
            there = os.environ["MASTER_ADDR"]
            console.print(
                f"Process {team.rank} of {team.count} (numbered from 0) takes part. The run is shown, and its folder "
                f"is written, by process 0 on {escape(there)}.",
                soft_wrap=True,
            )
        console.quiet = not team.is_first
        finished = train_run(run_file, run_dir, team)
    if speaks:
        console.quiet = False
        console.print("Done here." if finished else "Stopped here.")
    if not team.is_first:
        return True
    if finished:
        report_after_training(run_dir, run_file.report)
    return finished


def choose_run_dir(run_file: RunFile, *, resume: bool = False) -> Path:
    """Return the folder of the run: by its name, or a new one named by the data and the time."""
    root = Path(run_file.run.root)
    if run_file.run.name is not None:
        run_dir = root / run_file.run.name
        if resume and not (run_dir / "run.json").is_file():
            raise RunError(f"There is no run {run_dir} to go on with. Leave --resume out to start it.")
        return run_dir
    if resume:
        raise SettingsError("--resume needs the name of the run: --name NAME, or run.name in the run file.")
    stem = make_run_name(Path(run_file.data.train).stem) or "run"
    return root / f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"


def train_run(run_file: RunFile, run_dir: Path, team: "Team | None" = None) -> bool:
    """Train into ``run_dir`` with everything shown on screen; return False if it was stopped before its end."""
    from lorasmith.training.distributed import ALONE

    team = team or ALONE
    console.print(f"Run folder: [bold]{escape(str(run_dir))}[/]", soft_wrap=True)
    if team.from_first(lambda: _is_finished(run_dir, run_file)):
        return True
    from lorasmith.model.memory import keep_freed_memory

    keep_freed_memory()
    from lorasmith.training.job import hold_run, run_job

    with hold_run(run_dir) if team.is_first else nullcontext():
        with _reading_progress() as progress:
            job = prepare(
                run_file,
                run_dir,
                say=tell,
                progress=progress,
                team=team,
            )
        _print_plan(job)
        report = None
        with _stop_on_signals() as should_stop, _training_progress(job.num_steps) as show:
            for report in run_job(job, should_stop):
                show(report)
                if team.is_first:
                    _ask_samples(job, report)
        if report is not None and report.step < report.num_steps:
            return False
    if team.is_first:
        _print_result(run_dir)
    return True


def _is_finished(run_dir: Path, run_file: RunFile) -> bool:
    if not (run_dir / "run.json").is_file():
        return False
    if run_file.run.resume == "never":
        raise RunError(f"{run_dir} is there already. Choose another run.name, or remove the folder.")
    from lorasmith.training.same_run import is_finished

    if not is_finished(run_dir, run_file.model_dump(mode="json"), run_file.data, run_file.objective):
        return False
    console.print(
        "This run is finished already; nothing was trained. To train again, choose another name "
        "([bold]run.name=NAME[/]) or remove the folder."
    )
    _print_result(run_dir)
    return True


def _print_plan(job: "TrainingJob") -> None:
    """Say what will be done, and what packing saves."""
    from lorasmith.data.tokens import num_rows

    gain = job.gain
    row = ROW_WORDS[job.record.row_kind]
    ways = [f"{gain.padded:,} padded"]  # the last is that of this run
    if job.forward.packed:
        ways.append(f"{gain.packed:,} packed")
    if job.forward.share_prefixes:
        ways.append(f"[bold]{gain.shared:,}[/] with shared prefixes")
    console.print(
        f"{in_number(num_rows(job.dataset), row)}, {in_number(job.num_steps, 'step')} of "
        f"{in_number(job.training.batch_size, row)}. Tokens an epoch: {', '.join(ways)}."
    )
    warmup = job.training.num_warmup_steps(job.num_steps)
    if warmup >= job.num_steps:
        console.print(
            f"[yellow]Warning:[/] the warm-up takes {in_number(warmup, 'step')} and the run has {job.num_steps:,}: the "
            "learning rate never gets to its height. Lower training.warmup_steps, or train on more data."
        )


@contextmanager
def _stop_on_signals() -> Iterator[Any]:
    """Turn the first SIGINT or SIGTERM into a clean stop after the step; a second SIGINT ends at once."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        console.print("Stopping after this step; the run can be gone on with. (Ctrl-C again: stop at once)")

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _reading_progress() -> Iterator[Any]:
    """Show a bar for each slow part of the preparation, by its name."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, share: float) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=1.0)
            bars.update(tasks[what], completed=share)

        yield show


@contextmanager
def _training_progress(num_steps: int) -> Iterator[Any]:
    """Show step, loss, rate, speed and time left; where there is no terminal, a line now and then instead."""
    columns = (
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=24),
        TextColumn(
            "loss [bold]{task.fields[loss]}[/]{task.fields[others]}  rate {task.fields[rate]}  "
            "{task.fields[speed]} tokens/s  left"
        ),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task("", total=num_steps, loss="-", others="", rate="-", speed="-")

        def show(report: "StepReport") -> None:
            speed = f"{report.tokens_per_second:,.0f}"
            others = ""
            if (told := report.measured) is not None:
                # Labelled answers have no other one to lead by a margin.
                what, value = (
                    ("margin", told["reward_margin"]) if "reward_margin" in told else ("kl", told["kl"])
                )
                others = f"  {what} {value:.3f}  right {told['reward_accuracy']:.0%}"
            bars.update(
                task,
                completed=report.step,
                loss=f"{report.loss:.3f}",
                others=others,
                rate=f"{report.learning_rate:.2g}",
                speed=speed,
            )
            if report.memory_note is not None:
                console.print(f"[yellow]{escape(report.memory_note)}[/]")
            every = max(1, report.num_steps // 20)
            if not console.is_terminal and (report.step % every == 0 or report.step in (1, report.num_steps)):
                console.print(
                    f"step {report.step}/{report.num_steps}  loss {report.loss:.3f}{others}  "
                    f"rate {report.learning_rate:.2g}  {speed} tokens/s"
                )
            if report.validation_loss is not None:
                measured = report.validation_measured
                right = f", right {measured['reward_accuracy']:.0%}" if measured else ""
                console.print(
                    f"step {report.step}: validation loss [bold]{report.validation_loss:.3f}[/]{right}"
                )

        yield show


def _ask_samples(job: "TrainingJob", report: "StepReport") -> None:
    """Ask the run's sample questions when it is time, of the model as it stands."""
    from lorasmith.data.tokens import num_rows

    questions = job.output.sample_questions
    every = job.output.sample_every or job.training.steps_per_epoch(num_rows(job.dataset))
    if not questions or (report.step % every and report.step != report.num_steps):
        return
    from lorasmith.generation.chat import Chat
    from lorasmith.generation.sampling import SamplingSettings
    from lorasmith.training.reporters import note_samples

    with job.forward.asking():
        chat = Chat(job.model, job.tokenizer, job.recipe)
        answers = chat.ask_many(list(questions), sampling=SamplingSettings(max_tokens=64))
    asked = [(question, answer.text.strip()) for question, answer in zip(questions, answers, strict=True)]
    note_samples(job.run_dir, report.step, asked)
    for question, answer in asked:
        console.print(f"[dim]step {report.step}[/] {escape(question)} [bold]→[/] {escape(answer)}")


def _print_result(run_dir: Path) -> None:
    from lorasmith.export.card import write_card
    from lorasmith.model.run_record import read_run_record

    record = read_run_record(run_dir)
    assert record.result is not None, "printed only after the end"
    what = "model" if record.settings["method"]["name"] == "full" else "adapter"
    write_card(run_dir)
    result = record.result
    console.print(
        f"Done: loss [bold]{result['final_loss']:.3f}[/] after {in_number(result['steps'], 'step')}, "
        f"{result['training_seconds']:,.0f} s of training. {what.capitalize()}: [bold]{escape(str(run_dir / what))}[/]",
        soft_wrap=True,
    )
    console.print(
        f'Next: [bold]lorasmith ask "your question" --run {escape(str(run_dir))} --compare[/]', soft_wrap=True
    )


def _print_settings() -> None:
    table = Table("setting", "default", "meaning", box=None, pad_edge=False)
    for name, description in setting_names().items():
        section, _, key = name.partition(".")
        field = section_fields(section)[key]
        default = "(needed)" if field.is_required() else str(field.default)
        table.add_row(f"[bold]{name}[/]", escape(default), escape(description))
    console.print(table)
