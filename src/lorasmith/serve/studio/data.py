"""The tab Data: what training would make of a file, before anything is trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from markupsafe import Markup
from pydantic import BaseModel

from lorasmith.data.dataset import TokenizedDataset, examine_dataset
from lorasmith.data.preview import decode_spans
from lorasmith.data.prompts import choose_recipe
from lorasmith.data.receipt import Receipt
from lorasmith.data.statistics import Distribution, describe
from lorasmith.errors import LorasmithError, SettingsError
from lorasmith.model.base import load_tokenizer, resolve_base
from lorasmith.packing.plan import predict_gain
from lorasmith.serve.studio.form import ReadSettings, fields_of, make_input, read_form
from lorasmith.serve.studio.pieces import fault, figures, note, table
from lorasmith.serve.studio.places import Places
from lorasmith.training.schedule import order_steps

# Of the run file's settings, those that decide what becomes of a row.
NAMES = (
    "base.model",
    "data.format",
    "data.on_bad_row",
    "data.max_seq_len",
    "data.overlong",
    "prompt.recipe",
    "prompt.system",
    "prompt.learn",
)
RECIPES = ("auto", "chat", "alpaca")
_MOST_LISTED = 50


def build_data(
    places: Places, bases: Sequence[str], run_file: type[BaseModel], read_settings: ReadSettings
) -> gr.Dropdown:
    """Add the tab's contents to the page that is being built; return the choice of files, to be refreshed."""
    fields = fields_of(run_file)
    choices = {"base.model": bases, "prompt.recipe": RECIPES}
    drop = gr.File(
        label="Drop a data file here (.json, .jsonl, .csv, .parquet)", type="filepath", elem_id="data-drop"
    )
    with gr.Row(elem_classes="buttons"):
        file = gr.Dropdown([], label="File", elem_id="data-file")
        number = gr.Number(1, label="Example", precision=0, minimum=1, elem_id="data-example")
    with gr.Accordion("How it is read", open=False), gr.Row(elem_classes="settings"):
        inputs = [make_input(name, fields[name], choices=choices.get(name, ())) for name in NAMES]
    outcome = gr.HTML(note("Drop a file to see what training would make of it."), elem_id="data-outcome")

    def look(name: str | None, example: int, *values: Any) -> str:
        if not name:
            return note("Drop a file to see what training would make of it.")
        try:
            words = [
                f"data.train={places.upload(name)}",
                *read_form(fields, dict(zip(NAMES, values, strict=True))),
            ]
            return examine(read_settings(words), bases, int(example or 1))
        except LorasmithError as error:
            return fault(error)

    def keep(path: str | None) -> tuple[Any, Any]:
        if path is None:
            return gr.skip(), gr.skip()
        try:
            name = places.keep_upload(Path(path))
        except LorasmithError as error:
            return gr.skip(), fault(error)
        return gr.Dropdown(places.list_uploads(), value=name), note(f"Reading {name} ...")

    drop.upload(keep, drop, [file, outcome], api_visibility="private")
    gr.on(
        [file.change, number.change, *(field.change for field in inputs)],
        look,
        [file, number, *inputs],
        outcome,
        trigger_mode="always_last",
        api_visibility="private",
    )
    return file


def examine(settings: Any, bases: Sequence[str], number: int) -> str:
    """Return the receipt, the statistics and example ``number`` (from 1) of ``settings.data.train`` as HTML.

    Raises:
        LorasmithError: the file cannot be read, the base is not one of ``bases``, or the settings are wrong.
    """
    check_base(settings, bases)
    tokenizer = load_tokenizer(resolve_base(settings.base, fetches_weights=False))
    recipe, reason = choose_recipe(settings.prompt, tokenizer)
    dataset = examine_dataset(settings.data, recipe, tokenizer)
    parts = [_receipt(dataset.receipt)]
    if len(dataset):
        parts += [
            _example(dataset, tokenizer, min(number, len(dataset)) - 1, f"{recipe.name}: {reason}"),
            _statistics(dataset, settings),
        ]
    return Markup("").join(parts)


def check_base(settings: Any, bases: Sequence[str]) -> None:
    """Raise SettingsError for a base or a recipe that the page does not offer: both may be paths."""
    for name, value, offered in (
        ("base.model", settings.base.model, bases),
        ("prompt.recipe", settings.prompt.recipe, RECIPES),
    ):
        if value not in offered:
            raise SettingsError(f"{name} is {value!r}; the studio offers {', '.join(offered)}.")


def _receipt(receipt: Receipt) -> Markup:
    cut = f", {receipt.truncated:,} of them cut" if receipt.truncated else ""
    rows: list[tuple[Any, ...]] = [(f"{receipt.used:,}", Markup('<b class="good">used</b>{}').format(cut))]
    rows += [
        (f"{count:,}", Markup('<b class="warn">skipped</b>: {}').format(why))
        for why, count in receipt.skipped.items()
    ]
    rows += [
        (f"{count:,}", Markup('<b class="bad">wrong</b>: {}').format(why))
        for why, count in receipt.failed.items()
    ]
    rows.append((f"{receipt.rows_read:,}", "read"))
    if receipt.failed:
        verdict, look = (
            "Training would stop before its first step: mend the wrong rows, or have them left out.",
            "bad",
        )
    elif not receipt.used:
        verdict, look = "No row can be used.", "bad"
    else:
        verdict, look = "Ready to train.", "good"
    parts = [
        Markup("<h3>Receipt</h3>"),
        table(("rows", "what became of them"), rows),
        Markup('<p class="{}"><b>{}</b></p>').format(look, verdict),
    ]
    listed = [*receipt.faults, *receipt.skips]
    if listed:
        shown = listed[:_MOST_LISTED]
        more = f"The first {len(shown)} of {len(listed)}" if len(shown) < len(listed) else "All"
        parts.append(table(("where", "why"), shown, caption=f"Rows that are left out or wrong. {more}."))
    parts += [note(f"Warning: {warning}") for warning in receipt.warnings[:_MOST_LISTED]]
    return Markup("").join(parts)


def _example(dataset: TokenizedDataset, tokenizer: Any, place: int, recipe: str) -> Markup:
    example = dataset[place]
    text = Markup("").join(
        Markup("<mark>{}</mark>" if is_learnt else "<span>{}</span>").format(text)
        for text, is_learnt in decode_spans(example, tokenizer)
    )
    return Markup(
        '<h3>What the model sees</h3><p class="soft">Example {} of {:,}, {}. Marked: what it learns. '
        'Prompt recipe {}.</p><pre class="example" tabindex="0">{}</pre>'
    ).format(place + 1, len(dataset), example.where, recipe, text)


def _statistics(dataset: TokenizedDataset, settings: Any) -> Markup:
    gain = predict_gain(
        dataset, settings.training.batch_size, order=order_steps(dataset, settings.training).examples_of
    )
    longest = np.argsort(dataset.uncut_lengths, kind="stable")[::-1][:5].tolist()
    numbers = [
        ("examples", f"{len(dataset):,}"),
        ("tokens", f"{int(dataset.lengths.sum()):,}"),
        ("learnt", f"{int(dataset.num_learnt.sum()):,}"),
        ("tokens an epoch, padded", f"{gain.padded:,}"),
        ("tokens an epoch, packed here", f"{gain.shared:,}"),
    ]
    return Markup("<h3>Statistics</h3>{}{}{}<p>Longest rows, in tokens: {}</p>").format(
        figures(numbers),
        _histogram("Tokens of the prompt (not learnt)", describe(dataset.lengths - dataset.num_learnt)),
        _histogram("Tokens of the answer (learnt)", describe(dataset.num_learnt)),
        ", ".join(f"{dataset.where(i)} ({dataset.uncut_lengths[i]:,})" for i in longest),
    )


def _histogram(title: str, spread: Distribution) -> Markup:
    most = max(each.count for each in spread.bins)
    rows = Markup("").join(
        Markup(
            '<tr><th scope="row">{:,} to {:,}</th><td><i style="width:{:.1f}%"></i></td><td>{:,}</td></tr>'
        ).format(each.low, each.high, 100 * each.count / most, each.count)
        for each in spread.bins
    )
    return Markup(
        '<table class="histogram"><caption>{}: median {:,}, 95% up to {:,}</caption>{}</table>'
    ).format(title, spread.median, spread.percentile_95, rows)
