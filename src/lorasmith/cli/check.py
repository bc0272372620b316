"""``lorasmith check``: read a data file as training will, and show what became of it."""

import contextlib
import json
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lorasmith.cli.console import console
from lorasmith.data.settings import (
    ROW_WORDS,
    BadRowPolicy,
    DataSettings,
    FormatName,
    LearntTurns,
    OverlongPolicy,
    PromptSettings,
    RowKind,
)
from lorasmith.data.statistics import Distribution, describe
from lorasmith.errors import SettingsError
from lorasmith.model.settings import BUILT_IN, BaseSettings

if TYPE_CHECKING:
    from lorasmith.data.dataset import Progress, TokenizedDataset
    from lorasmith.data.prompts import PromptRecipe
    from lorasmith.data.receipt import Receipt
    from lorasmith.data.tokens import TokenizedExample
    from lorasmith.packing.plan import Gain

EXIT_WRONG_ROWS = 2
_PREFIXES_TRIED = (64, 256)  # tokens
_WORTH_GROUPING = 0.8
_MOST_ROWS_TO_GROUP = 100_000  # counting takes 20 microseconds a row
_NUM_SHOWN = 5  # rows in a list that is only to give an idea
_MAX_FAULTS = 1000
_BAR_WIDTH = 40
_BAR_EIGHTHS = " ▏▎▍▌▋▊▉"


def command(
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A .json, .jsonl, .csv, .parquet (with --text .txt, .md) file, a folder, or a Hub data set id.",
        ),
    ],
    model: Annotated[
        str, typer.Option(help="The base whose tokenizer counts: Hub id, folder or .gguf file.")
    ] = BUILT_IN,
    pairs: Annotated[
        bool,
        typer.Option(
            "--pairs", help="Rows of two answers, the better one named: objective.name=dpo and others."
        ),
    ] = False,
    labels: Annotated[
        bool,
        typer.Option("--labels", help="Answers labelled true or false, or pairs: objective.name=kto."),
    ] = False,
    text: Annotated[
        bool, typer.Option("--text", help="Plain texts, every token of which is learnt: objective.name=text.")
    ] = False,
    format: Annotated[FormatName, typer.Option(help="Row format; auto detects it for each file.")] = "auto",
    recipe: Annotated[
        str, typer.Option(help="Prompt recipe: auto, alpaca, chat, text, or a .jinja file.")
    ] = "auto",
    system: Annotated[str | None, typer.Option(help="System prompt for rows that have none.")] = None,
    learn: Annotated[LearntTurns, typer.Option(help="Assistant turns that are learnt.")] = "all",
    max_seq_len: Annotated[int, typer.Option(min=8, help="Longest example, in tokens.")] = 512,
    overlong: Annotated[OverlongPolicy, typer.Option(help="What becomes of longer examples.")] = "error",
    on_bad_row: Annotated[BadRowPolicy, typer.Option(help="What becomes of wrong rows.")] = "error",
    split: Annotated[str, typer.Option(help="Split of a Hub data set.")] = "train",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")] = False,
) -> None:
    """Read a data file as training will: receipt, statistics, and what the model sees.

    Nothing is trained. The exit code is 0 when every row is used or skipped, 2 when rows are wrong.
    """
    from lorasmith.data.dataset import examine_dataset
    from lorasmith.data.prompts import choose_recipe
    from lorasmith.model.base import load_tokenizer, resolve_base
    from lorasmith.training.settings import TrainingSettings

    kind = _choose_kind(pairs=pairs, labels=labels, text=text)
    settings = DataSettings(
        train=data,
        format=format,
        on_bad_row=on_bad_row,
        max_seq_len=max_seq_len,
        overlong=overlong,
        split=split,
    )
    base = resolve_base(
        BaseSettings(model=model),
        tell=lambda line: None if as_json else console.print(escape(line)),
        fetches_weights=False,
    )
    tokenizer = load_tokenizer(base)
    prompt_settings = PromptSettings(recipe=recipe, system=system, learn=learn)
    prompt, reason = choose_recipe(prompt_settings, tokenizer, kind)
    with _reading_progress(shows=not as_json) as progress:
        dataset = examine_dataset(settings, prompt, tokenizer, kind=kind, progress=progress)
    batch_size = TrainingSettings().batch_size
    gain = _predict_gain(dataset) if len(dataset) else None
    grouped = _gain_of_grouping(dataset, gain) if gain and not as_json else None
    if as_json:
        report = _to_json(dataset, prompt, reason, tokenizer, gain)
        console.print_json(json.dumps(report, ensure_ascii=False))
    else:
        _print_receipt(dataset.receipt)
        if labels and gain is not None:
            num_bad = int(dataset.is_rejected.sum())
            console.print(f"{len(dataset) - num_bad:,} answers are good (true), {num_bad:,} bad (false).")
        if gain is not None:
            _print_statistics(dataset)
            _print_first_example(dataset, prompt, reason, tokenizer)
        if not text:
            _print_cuts(dataset.receipt, settings)
        if gain is not None:
            _print_gain(gain, f"{batch_size} {ROW_WORDS[kind]}s", grouped)
    if labels and gain is not None and dataset.is_rejected.all() == dataset.is_rejected.any():
        from lorasmith.training.kto import check_labels

        check_labels(dataset.is_rejected, data)  # all are alike: training would say so too
    if not as_json:
        train_command = _train_command(model, settings, prompt_settings)
        objective = {
            "pairs": " objective.name=dpo",
            "labelled": " objective.name=kto",
            "documents": " objective.name=text",
        }.get(kind, "")
        _print_verdict(dataset.receipt, train_command + objective)
    if dataset.receipt.failed or not dataset.receipt.used:
        raise typer.Exit(EXIT_WRONG_ROWS)


def _choose_kind(*, pairs: bool, labels: bool, text: bool) -> RowKind:
    """Return what a row is by the one option that says so, if any."""
    from lorasmith.data.dataset import CHECK_FLAGS

    said: dict[RowKind, bool] = {"pairs": pairs, "labelled": labels, "documents": text}
    given: list[RowKind] = [kind for kind, is_given in said.items() if is_given]
    if len(given) > 1:
        flags = " and ".join(CHECK_FLAGS[kind].strip() for kind in given)
        raise SettingsError(f"{flags} were given: rows are pairs, labelled answers or plain texts. Give one.")
    return given[0] if given else "answers"


@contextlib.contextmanager
def _reading_progress(*, shows: bool) -> Iterator["Progress"]:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("reading and tokenising"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rows]:,} rows, left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not shows) as bars:
        task = bars.add_task("", total=1.0, rows=0)
        yield lambda rows, share: bars.update(task, completed=share, rows=rows)


def _print_receipt(receipt: "Receipt") -> None:
    console.print(f"[bold]Receipt of {escape(receipt.source)}[/]", soft_wrap=True)
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("rows", justify="right")
    table.add_column("what became of them")
    cut = f", {receipt.truncated:,} cut" if receipt.truncated else ""
    if receipt.pieces:
        cut = f", as {receipt.pieces:,} pieces; {receipt.divided:,} cut where paragraphs end"
    table.add_row(f"{receipt.used:,}", f"[green]used[/]{cut}")
    for reason, count in receipt.skipped.items():
        table.add_row(
            f"{count:,}", f"[yellow]skipped[/]: {escape(reason)}{_first_wheres(receipt.skips, reason)}"
        )
    for reason, count in receipt.failed.items():
        table.add_row(f"{count:,}", f"[red]wrong[/]: {escape(reason)}")
    table.add_section()
    table.add_row(f"[bold]{receipt.rows_read:,}[/]", "[bold]read[/]")
    console.print(table)
    console.print()
    _print_list("[red]Wrong rows[/]", [f"{where}: {reason}" for where, reason in receipt.faults], _MAX_FAULTS)
    _print_list("[yellow]Warnings[/]", list(receipt.warnings), _NUM_SHOWN)


def _first_wheres(rows: tuple[tuple[str, str], ...], reason: str) -> str:
    wheres = [where for where, text in rows if text == reason or text.startswith(f"{reason}:")]
    if not wheres:
        return ""
    more = ", ..." if len(wheres) > _NUM_SHOWN else ""
    return escape(f"  ({', '.join(wheres[:_NUM_SHOWN])}{more})")


def _print_list(title: str, lines: list[str], limit: int) -> None:
    if not lines:
        return
    console.print(f"{title}")
    for line in lines[:limit]:
        console.print(f"  {escape(line)}", soft_wrap=True)
    if len(lines) > limit:
        console.print(f"  ... and {len(lines) - limit:,} more")
    console.print()


def _print_statistics(dataset: "TokenizedDataset") -> None:
    answer = dataset.num_learnt
    shown = (
        ("Tokens of the prompt (not learnt)", dataset.lengths - answer),
        ("Tokens of the answer (learnt)", answer),
    )
    if dataset.documents is not None:
        shown = (("Tokens of a piece", dataset.lengths),)
    for name, values in shown:
        console.print(_histogram(name, describe(values)))
        console.print()
    longest = np.argsort(dataset.uncut_lengths, kind="stable")[::-1][:_NUM_SHOWN]
    rows = [f"{dataset.where(i)} ({dataset.uncut_lengths[i]:,})" for i in longest.tolist()]
    if dataset.documents is None:
        console.print(f"Longest rows, in tokens: {escape(', '.join(rows))}", soft_wrap=True)
    console.print(
        f"All together: {int(dataset.lengths.sum()):,} tokens, {int(answer.sum()):,} of them learnt.\n"
    )


def _histogram(title: str, spread: Distribution) -> Group:
    summary = (
        f"median {spread.median:,}, mean {spread.mean:,.0f}, 95% up to {spread.percentile_95:,}, "
        f"shortest {spread.minimum:,}, longest {spread.maximum:,}"
    )
    most = max(b.count for b in spread.bins)
    width = len(f"{spread.bins[-1].high:,}")
    lines = [Text.assemble((title, "bold"), f": {summary}")]
    for b in spread.bins:
        label = f"{b.low:>{width},}" if b.low == b.high else f"{b.low:>{width},} - {b.high:>{width},}"
        lines.append(Text.assemble(f"  {label} ", (_bar(b.count / most), "cyan"), f" {b.count:,}"))
    return Group(*lines)


def _bar(share: float) -> str:
    eighths = max(1, round(share * _BAR_WIDTH * 8)) if share else 0
    return ("█" * (eighths // 8) + _BAR_EIGHTHS[eighths % 8]).rstrip().ljust(_BAR_WIDTH)


def _example_to_show(dataset: "TokenizedDataset") -> "TokenizedExample":
    """Return the first example that is learnt: a good answer, where there is one."""
    return dataset[int(np.argmin(dataset.is_rejected))]


def _print_first_example(dataset: "TokenizedDataset", prompt: "PromptRecipe", reason: str, tokenizer) -> None:
    from lorasmith.data.preview import preview

    has_colour = console.color_system is not None
    how = "green" if has_colour else "in 「 」"
    example = _example_to_show(dataset)
    title = f"What the model sees of {escape(example.where)}; what it learns is {how}"
    asked = (
        " It is for asking only: texts are learnt without a template."
        if dataset.documents is not None
        else ""
    )
    console.print(f"Prompt recipe: [bold]{escape(prompt.name)}[/] ({escape(reason)}).{asked}", soft_wrap=True)
    console.print(Panel(preview(example, tokenizer, has_colour=has_colour), title=title, title_align="left"))
    console.print()


def _print_cuts(receipt: "Receipt", settings: DataSettings) -> None:
    from lorasmith.data.dataset import NO_ROOM, OVERLONG

    limit = f"max_seq_len {settings.max_seq_len:,}"
    num_failed, num_dropped = receipt.failed.get(OVERLONG, 0), receipt.skipped.get(OVERLONG, 0)
    if num_failed:
        text = (
            f"[red]Longer than {limit}: {num_failed:,}[/]. Choose: --overlong drop (left out, counted), "
            "--overlong truncate (answers are cut, the end token is kept), or a larger --max-seq-len."
        )
    elif num_dropped:
        text = f"Longer than {limit}, left out by --overlong drop: {num_dropped:,}."
    elif receipt.truncated or receipt.skipped.get(NO_ROOM):
        text = f"Longer than {limit}, cut by --overlong truncate, the end token kept: {receipt.truncated:,}."
        if num_without := receipt.skipped.get(NO_ROOM):
            text += f" Left out, because the prompt alone is longer: {num_without:,}."
    elif not receipt.used:
        return
    else:
        text = f"Nothing will be cut: every example fits into {limit}."
    console.print(text)


def _predict_gain(dataset: "TokenizedDataset", group_prefix_tokens: int | None = None) -> "Gain":
    """Return what packing saves at the usual batch size."""
    from lorasmith.packing.plan import predict_gain
    from lorasmith.training.schedule import order_steps
    from lorasmith.training.settings import TrainingSettings

    settings = TrainingSettings(group_prefix_tokens=group_prefix_tokens)
    return predict_gain(dataset, settings.batch_size, order=order_steps(dataset, settings).examples_of)


def _gain_of_grouping(dataset: "TokenizedDataset", gain: "Gain") -> tuple[int, int] | None:
    """Return a number of prefix tokens to group by, and the tokens of an epoch then, if that saves a good part."""
    if len(dataset) > _MOST_ROWS_TO_GROUP:
        return None
    found = [(num_tokens, _predict_gain(dataset, num_tokens).shared) for num_tokens in _PREFIXES_TRIED]
    best = min(found, key=lambda pair: pair[1])
    return best if best[1] < _WORTH_GROUPING * gain.shared else None


def _print_gain(gain: "Gain", in_a_step: str, grouped: tuple[int, int] | None) -> None:
    about = "about " if gain.is_estimate else ""
    console.print(
        f"Packing, at {in_a_step} a step: an epoch computes {about}[bold]{gain.shared:,}[/] tokens "
        f"instead of {gain.padded:,} with padding, {gain.padded / max(1, gain.shared):.1f} times fewer "
        f"({gain.packed:,} without sharing prefixes).\n"
    )
    if grouped is not None:
        console.print(
            f"Many rows begin alike: training.group_prefix_tokens={grouped[0]} puts them into the same steps, which "
            f"then compute {grouped[1]:,} tokens an epoch.\n"
        )


def _train_command(model: str, data: DataSettings, prompt: PromptSettings) -> str:
    """Return the command that trains with what was checked: every setting that is not its default."""
    words = ["lorasmith train", f"--data {shlex.quote(data.train)}"]
    if model != BUILT_IN:
        words.append(f"--model {shlex.quote(model)}")
    for section, settings in (("data", data), ("prompt", prompt)):
        changed = settings.model_dump(exclude_defaults=True, exclude={"train"})
        words += [f"{section}.{key}={shlex.quote(str(value))}" for key, value in changed.items()]
    return " ".join(words)


def _print_verdict(receipt: "Receipt", train_command: str) -> None:
    if receipt.failed:
        from lorasmith.data.dataset import OVERLONG

        text = f"[red]Wrong rows: {receipt.num_failed:,}[/]. Training would stop before its first step."
        if set(receipt.failed) != {OVERLONG}:
            text += " Fix them, or leave them out, counted, with --on-bad-row skip."
        console.print(text)
    elif not receipt.rows_read:
        console.print("[red]The data is empty:[/] there is no row in it.")
    elif not receipt.used:
        console.print("[red]No row can be used.[/]")
    else:
        console.print(f"[green]Ready to train[/]: {escape(train_command)}", soft_wrap=True)


def _to_json(
    dataset: "TokenizedDataset", prompt: "PromptRecipe", reason: str, tokenizer, gain: "Gain | None"
) -> dict[str, Any]:
    from lorasmith.data.preview import decode_spans

    report: dict[str, Any] = {
        "receipt": dataset.receipt.to_json(),
        "recipe": {"name": prompt.name, "reason": reason, "fingerprint": prompt.fingerprint()},
        "data_fingerprint": dataset.fingerprint,
    }
    if gain is None:
        return report
    longest = np.argsort(dataset.uncut_lengths, kind="stable")[::-1][:_NUM_SHOWN].tolist()
    first = _example_to_show(dataset)
    return report | {
        "tokens": {
            "all": int(dataset.lengths.sum()),
            "learnt": int(dataset.num_learnt.sum()),
            "prompt": describe(dataset.lengths - dataset.num_learnt).to_json(),
            "answer": describe(dataset.num_learnt).to_json(),
        },
        "longest": [{"where": dataset.where(i), "tokens": int(dataset.uncut_lengths[i])} for i in longest],
        "first_example": {
            "where": first.where,
            "spans": [
                {"text": text, "is_learnt": is_learnt} for text, is_learnt in decode_spans(first, tokenizer)
            ],
        },
        "packing": {
            "padded_tokens": gain.padded,
            "packed_tokens": gain.packed,
            "shared_tokens": gain.shared,
            "is_estimate": gain.is_estimate,
        },
    }
