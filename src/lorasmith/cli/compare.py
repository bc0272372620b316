"""``lorasmith compare``: the same data, split, seed and budget, several methods; which is best, and at what price."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from lorasmith.cli.apart import Metrics, train_apart
from lorasmith.cli.candidates import (
    Candidate,
    change,
    check_budgets,
    check_held_out_is_there,
    make_candidates,
    read_methods,
    with_budget,
)
from lorasmith.cli.console import console
from lorasmith.cli.report import check_held_out
from lorasmith.cli.run_file import make_run_name, write_run_file
from lorasmith.cli.train import EXIT_STOPPED
from lorasmith.data.sources import open_source
from lorasmith.errors import LorasmithError, RunError, SettingsError, TrainingError
from lorasmith.evaluation.comparison import (
    HEADER,
    LEGEND,
    UNTUNED,
    Entry,
    Untuned,
    check_asked_alike,
    rank,
    read_entry,
    tell_best,
    write_comparison,
)
from lorasmith.model.run_record import read_run_record

EXIT_FAILED = 1
_WIDTHS = (7, 5, 8, 4, 7, 5, 7, 7, 5, 6)  # of the columns after the first


def command(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN.yaml... [SECTION.KEY=VALUE]...",
            help="A run file, or several to compare; settings that override all of them.",
        ),
    ],
    methods: Annotated[
        str | None,
        typer.Option(help="Tuning methods, by comma, or all. Default: the run files as they are."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Train each on so many tokens of data. Default: as the run files say."),
    ] = None,
    search: Annotated[
        bool,
        typer.Option("--search", help="Try learning rates and ranks instead, and write the best run file."),
    ] = False,
    minutes: Annotated[
        float, typer.Option(min=0.1, help="Time for --search, all starts of it together.")
    ] = 60.0,
    name: Annotated[
        str | None, typer.Option(help="Folder of the comparison, below run.root. Default: compare-DATA.")
    ] = None,
) -> None:
    """Train several methods on the same data, split, seed and budget, ask each the same, and say which is best.

    Each is one [bold]lorasmith train[/] in a process of its own, with a run folder and a run file of its own. With
    --search, each method's learning rate and rank are tried by Optuna, judged by the validation loss. What was
    stopped goes on when it is started again.
    """
    names = read_methods(methods) if methods is not None else []
    whole = make_candidates(arguments, names)
    first = whole[0].run_file
    if len(whole) < 2 and not search:
        raise SettingsError("One run is nothing to compare: name --methods lora,full, or several run files.")
    if not search:  # which asks nothing, and wants a validation loss: search.py looks for it
        check_held_out_is_there(first)
    check_held_out(first.report.model_copy(update={"after_training": True}), first.objective.kind)
    candidates = whole
    if tokens is not None:
        candidates, epochs = with_budget(whole, tokens)
        console.print(f"Budget: about {tokens:,} tokens of data each, {epochs:g} epochs.")
    check_budgets(candidates)
    stem = make_run_name(Path(first.data.train).stem) or "runs"
    folder = Path(first.run.root) / (name or f"compare-{stem}")
    if folder.exists() and any(candidate.run_file.run.resume == "never" for candidate in candidates):
        raise RunError(
            f"{folder} is there already. Choose another name with --name NAME, or run.resume=auto to go on with it."
        )
    if search:
        _search(candidates, whole, folder, minutes)
        return
    entries, faults = _train_all(candidates, folder)
    if entries:
        ranked, untuned = rank([entry for entry, _ in entries]), entries[0][1]
        write_comparison(folder, ranked, untuned, faults)
        _print_end(folder, ranked, untuned, _first_width(candidates))
    if faults:
        sys.exit(EXIT_FAILED)


def _train_all(
    candidates: Sequence[Candidate], folder: Path
) -> tuple[list[tuple[Entry, Untuned]], dict[str, str]]:
    """Train and ask each candidate, print a line when it ends, and return what was found and what failed."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {candidate.name: _write(candidate, folder) for candidate in candidates}
    console.print(f"Comparison: [bold]{escape(str(folder))}[/]", soft_wrap=True)
    width = _first_width(candidates)
    console.print(_line(HEADER, width), style="bold", soft_wrap=True)
    entries, faults = [], {}
    for number, candidate in enumerate(candidates, 1):
        run_dir = folder / candidate.name
        try:
            if not _is_there(candidate, run_dir):
                progress = f"{candidate.name} ({number} of {len(candidates)})"
                if not _train(progress, files[candidate.name], run_dir):
                    console.print(
                        f"Stopped in {escape(progress)}; the same command goes on with it.", soft_wrap=True
                    )
                    sys.exit(EXIT_STOPPED)
            found = read_entry(candidate.name, run_dir)
            check_asked_alike((entries or [found])[0][0], found[0])
            entries.append(found)
            console.print(escape(_line(entries[-1][0].cells(), width)), soft_wrap=True)
        except LorasmithError as fault:
            faults[candidate.name] = str(fault)
            console.print(f"[red]{escape(candidate.name)} failed:[/] {escape(str(fault))}", soft_wrap=True)
    return entries, faults


def _search(
    candidates: Sequence[Candidate], whole: Sequence[Candidate], folder: Path, minutes: float
) -> None:
    """Search for ``minutes`` and write best.yaml: the best settings with the budget of the ``whole`` run file."""
    from lorasmith.cli.search import in_words, open_study, search, with_settings

    study = open_study(candidates, folder)
    console.print(f"Search: [bold]{escape(str(folder))}[/], {minutes:g} minutes", soft_wrap=True)
    tell = lambda line: console.print(escape(line), soft_wrap=True)  # noqa: E731
    tried, was_stopped = search(study, candidates, folder, minutes, tell)
    if was_stopped:
        console.print("Stopped; the same command goes on with it.")
        sys.exit(EXIT_STOPPED)
    if not tried:
        raise TrainingError(
            f"No trial came to its end within {minutes:g} minutes. Give more time (--minutes), or each trial less "
            "to train on: --tokens N."
        )
    best = tried[0]
    own = next((one for one in tried if one.name == best.name and one.is_own), None)
    console.print(f"Best of {len(tried)}: {escape(in_words(best.name, best.settings))}: {best.loss:.4f}.")
    if own is best:
        console.print("These are its own settings: nothing that was tried is better.")
    elif own is not None:
        console.print(f"Its own settings ({escape(in_words(own.name, own.settings))}) gave {own.loss:.4f}.")
    file = folder / "best.yaml"
    chosen = next(candidate for candidate in whole if candidate.name == best.name)
    comment = (
        f"Found by lorasmith compare --search: validation loss {best.loss:.4f}, the best of {len(tried)}."
    )
    write_run_file(file, with_settings(chosen.run_file, best.settings), comment=comment)
    console.print(f"Next: [bold]lorasmith train {escape(str(file))}[/]", soft_wrap=True)


def _write(candidate: Candidate, folder: Path) -> Path:
    """Write the candidate's run file into the comparison; one that is there must say the same.

    Raises:
        RunError: it says something else, so its run is another comparison's.
    """
    target, new = folder / f"{candidate.name}.yaml", folder / f".{candidate.name}.new.yaml"
    run = {"root": str(folder.absolute()), "name": candidate.name}
    # Training questions are asked of a run to explain its verdict; a comparison has no column for them.
    report = {"after_training": True, "max_training_questions": 0}
    write_run_file(new, change(candidate.run_file, run=run, report=report))
    if target.is_file() and target.read_bytes() != new.read_bytes():
        new.unlink()
        raise RunError(
            f"{folder} holds a comparison with other settings ({target.name} differs). Give this one a name of its "
            "own, --name NAME, or remove the folder."
        )
    new.replace(target)
    return target


def _is_there(candidate: Candidate, run_dir: Path) -> bool:
    """Whether the run and its report are finished, on the data as it is now."""
    from lorasmith.evaluation.report import PAGE_FILE

    if not (run_dir / PAGE_FILE).is_file():
        return False
    data = candidate.run_file.data
    return (
        open_source(data.train, split=data.split, kind=candidate.run_file.objective.kind).fingerprint()
        == read_run_record(run_dir).data["fingerprint"]
    )


def _train(progress: str, file: Path, run_dir: Path) -> bool:
    """Train and report in a process of its own; return False where it was stopped."""
    from lorasmith.evaluation.report import PAGE_FILE

    with console.status(f"{escape(progress)}: starting") as status:

        def watch(steps: list[Metrics]) -> bool:
            if steps:
                now = steps[-1]
                done = f"step {now['step']}/{now['num_steps']}, loss {now['loss']:.3f}"
                status.update(
                    f"{escape(progress)}: {done}"
                    if now["step"] < now["num_steps"]
                    else f"{escape(progress)}: trained, being asked"
                )
            return False

        return train_apart(file, run_dir, file.with_suffix(".log"), watch) and (run_dir / PAGE_FILE).is_file()


def _first_width(candidates: Sequence[Candidate]) -> int:
    return max(len(name) for name in (UNTUNED, *(candidate.name for candidate in candidates)))


def _line(cells: Sequence[str], width: int) -> str:
    """Return cells as one line of columns, the first ``width`` wide."""
    others = (cell.rjust(wide) for cell, wide in zip(cells[1:], _WIDTHS, strict=True))
    return " ".join((cells[0].ljust(width), *others)).rstrip()


def _print_end(folder: Path, ranked: Sequence[Entry], untuned: Untuned, width: int) -> None:
    console.print("\nThe best first:")
    console.print(_line(HEADER, width), style="bold", soft_wrap=True)
    for row in (*ranked, untuned):
        console.print(escape(_line(row.cells(), width)), soft_wrap=True)
    console.print(f"[dim]{LEGEND}[/]\n")
    for line in tell_best(ranked, untuned):
        console.print(escape(line))
    console.print(
        f"Table and picture: [bold]{escape(str(folder))}/comparison.md[/], comparison.png. "
        f"Next: [bold]lorasmith chat --run {escape(str(folder / ranked[0].name))}[/]",
        soft_wrap=True,
    )
