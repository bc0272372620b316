"""The tab Train: a form, a process of its own, and a look at what it writes, as often as anybody looks."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import yaml
from markupsafe import Markup
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lorasmith.errors import LorasmithError, RunError
from lorasmith.evaluation.charts import Line, draw_lines
from lorasmith.files import write_whole
from lorasmith.model.method_settings import METHODS
from lorasmith.model.run_record import read_run_record
from lorasmith.serve.studio import jobs
from lorasmith.serve.studio.data import RECIPES, check_base
from lorasmith.serve.studio.form import ReadSettings, fields_of, make_choice, make_input, read_form
from lorasmith.serve.studio.pieces import fault, figures, log, note, table
from lorasmith.serve.studio.places import Places
from lorasmith.serve.studio.progress import Progress, list_names, read_progress
from lorasmith.training.estimate import in_words
from lorasmith.training.reporters import running_mean

# Shown at the top of the form; every other setting stands below, by its section.
_FIRST = ("run.name", "data.train", "base.model", "training.epochs", "run.sample_questions")
# Not for the page: paths, code of strangers, and what sends data elsewhere. A run file can say them.
_NOT_OFFERED = {
    "base.revision",
    "base.trust_remote_code",
    "data.cache_dir",
    "data.split",
    "run.root",
    "run.resume",
    "run.trackers",
}
_FILES = ("data.train", "data.validation", "report.data")  # names of uploads
_INFO = {
    "run.name": "letters, digits, and . _ - inside; it becomes the run's folder",
    "base.model": "what the server was started with, and the built-in smollm2-135m",
}
_LOOK_SECONDS = 2.0

Refresh = Callable[[], tuple[Any, ...]]


def build_train(
    places: Places, bases: Sequence[str], run_file: type[BaseModel], read_settings: ReadSettings
) -> tuple[list[Any], Refresh]:
    """Add the tab's contents to the page that is being built; return the inputs that need refreshing, and how."""
    fields = {name: field for name, field in fields_of(run_file).items() if name not in _NOT_OFFERED}
    choices = {"base.model": bases, "prompt.recipe": RECIPES, "method.name": list(METHODS)}
    inputs: dict[str, Any] = {}

    def add(names: Sequence[str]) -> None:
        for name in names:
            if name in _FILES:
                inputs[name] = make_choice(
                    name, fields[name], info="one of the files that were dropped into the tab Data"
                )
            else:
                inputs[name] = make_input(
                    name, fields[name], choices=choices.get(name, ()), info=_INFO.get(name, "")
                )

    gr.Markdown("### Start a run")
    with gr.Row(elem_classes="settings"):
        add(_FIRST)
    with gr.Accordion("Every other setting", open=False):
        for section in run_file.model_fields:
            with gr.Accordion(section.capitalize(), open=False):
                with gr.Row(elem_classes="settings"):
                    add([name for name in fields if _section(name) == section and name not in _FIRST])
                if section == "method":
                    _add_methods(fields, add, inputs["method.name"])
    start = gr.Button("Start training", variant="primary", elem_id="train-start")
    said = gr.HTML(elem_id="train-said")
    gr.Markdown("### Watch a run")
    run = gr.Dropdown([], label="Run", elem_id="train-run")
    with gr.Row(elem_classes="buttons"):
        stop = gr.Button("Stop after this step", elem_id="train-stop")
        resume = gr.Button("Go on", elem_id="train-resume")
    view = gr.HTML(elem_id="train-view")
    seen = gr.State("")
    timer = gr.Timer(_LOOK_SECONDS)

    def look(name: str | None, before: str) -> tuple[Any, Any]:
        try:
            shown = show(read_progress(places, name)) if name else note("No run is chosen.")
        except LorasmithError as error:
            shown = fault(error)
        return (gr.skip(), gr.skip()) if shown == before else (shown, shown)

    def begin(*values: Any) -> tuple[Any, Any]:
        try:
            name = start_run(places, bases, fields, dict(zip(inputs, values, strict=True)), read_settings)
        except LorasmithError as error:
            return fault(error), gr.skip()
        said = note(f"{name} is started. It goes on if you close this page.")
        return said, gr.Dropdown(list_names(places), value=name)

    def act(what: Callable[[Places, str], str], name: str | None) -> str:
        try:
            return note(what(places, name or ""))
        except LorasmithError as error:
            return fault(error)

    start.click(begin, [*inputs.values()], [said, run], api_visibility="private")
    stop.click(lambda name: act(stop_run, name), run, said, api_visibility="private")
    resume.click(lambda name: act(resume_run, name), run, said, api_visibility="private")
    gr.on(
        [timer.tick, run.change],
        look,
        [run, seen],
        [view, seen],
        show_progress="hidden",
        trigger_mode="once",
        concurrency_limit=None,
        api_visibility="private",
    )
    refreshed = [inputs[name] for name in _FILES]

    def refresh() -> tuple[Any, ...]:
        uploads, names = places.list_uploads(), list_names(places)
        running = next((name for name in names if jobs.find(places.run(name), "train")), None)
        return (
            *(gr.Dropdown(uploads) for _ in refreshed),
            gr.Dropdown(names, value=running) if running else gr.Dropdown(names),
        )

    return [*refreshed, run], refresh


def _section(name: str) -> str:
    return name.rpartition(".")[0]


def _add_methods(
    fields: Mapping[str, FieldInfo], add: Callable[[Sequence[str]], None], choice: gr.Dropdown
) -> None:
    """Add each method's own settings; those of the chosen one are shown."""
    groups = []
    for method, kind in METHODS.items():
        with gr.Column(visible=method == choice.value, elem_id=f"method-{method}".replace("_", "-")) as group:
            gr.Markdown(kind.__doc__)
            with gr.Row(elem_classes="settings"):
                add([name for name in fields if _section(name) == f"method.{method}"])
        groups.append(group)
    choice.change(
        lambda chosen: [gr.Column(visible=method == chosen) for method in METHODS],
        choice,
        groups,
        show_progress="hidden",
        api_visibility="private",
    )


def start_run(
    places: Places,
    bases: Sequence[str],
    fields: Mapping[str, FieldInfo],
    values: dict[str, Any],
    read_settings: ReadSettings,
) -> str:
    """Write a run file from the form's values, start its training, and return the run's name.

    Raises:
        LorasmithError: a setting is wrong, the name is missing or taken, or the data is not among the uploads.
    """
    for name in _FILES:
        chosen = values[name]
        if isinstance(chosen, list):
            values[name] = "\n".join(str(places.upload(each)) for each in chosen)
        elif chosen:
            values[name] = str(places.upload(chosen))
    settings: Any = read_settings([*read_form(fields, values), f"run.root={places.runs}"])
    check_base(settings, bases)
    if settings.run.name is None:
        raise RunError("The run has no name. Give it one: letters, digits, and . _ - inside.")
    run_dir = places.run(settings.run.name)
    if run_dir.exists():
        raise RunError(
            f"There is a run {settings.run.name} already. Choose another name, or go on with it below."
        )
    run_dir.mkdir(parents=True)
    changed = settings.model_dump(mode="json", exclude_defaults=True)
    # The name is the default of its own class, and so left out.
    changed["method"] = {"name": settings.method.name, **changed.get("method", {})}
    _write_run_file(run_dir, changed)
    jobs.start(run_dir, "train", ["train", str(run_dir / "run.yaml")])
    return settings.run.name


def stop_run(places: Places, name: str) -> str:
    """Ask the run's process to stop after its step; return what is to be said."""
    jobs.stop(places.run(name), "train")
    return f"{name} stops after the step it is at. Everything is saved then."


def resume_run(places: Places, name: str) -> str:
    """Start the run's process again where it stopped; return what is to be said."""
    run_dir = places.run(name)
    if not (run_dir / "run.yaml").is_file():  # begun in a terminal: what it was told is in its record
        settings = read_run_record(run_dir).settings
        where = {"root": str(run_dir.parent), "name": run_dir.name}
        _write_run_file(run_dir, {**settings, "run": {**settings.get("run", {}), **where}})
    jobs.start(run_dir, "train", ["train", str(run_dir / "run.yaml")])
    return f"{name} goes on."


def _write_run_file(run_dir: Path, settings: dict[str, Any]) -> None:
    plain = json.loads(json.dumps(settings))
    write_whole(run_dir / "run.yaml", yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def show(progress: Progress) -> str:
    """Return a run at this moment as HTML: state, numbers, curves, sample answers, and what its process says."""
    words = {
        "preparing": "Preparing: reading the data, loading the base, measuring what fits.",
        "training": "Training.",
        "reporting": "Trained. The report is being written.",
        "finished": "Finished.",
        "stopped": "Stopped. It can be gone on with.",
        "failed": "It ended before its first checkpoint; the reason is below.",
    }
    look = {"finished": "good", "stopped": "warn", "failed": "bad"}.get(progress.state, "soft")
    parts = [
        Markup('<p class="state {}" role="status"><b>{}</b>: {}</p>').format(
            look, progress.name, words[progress.state]
        )
    ]
    if progress.metrics:
        parts += [_bar(progress), figures(_numbers(progress)), _curves(progress)]
    if progress.samples:
        rows = [
            (sample["step"], sample["question"], sample["answer"]) for sample in reversed(progress.samples)
        ]
        parts.append(table(("step", "question", "answer"), rows, caption="What it answers while it learns"))
    if progress.state != "finished":
        parts.append(log(progress.log, label="What the process says"))
    return Markup("").join(parts)


def _bar(progress: Progress) -> Markup:
    last = progress.metrics[-1]
    return Markup('<progress max="{}" value="{}" aria-label="Steps done"></progress>').format(
        last["num_steps"], last["step"]
    )


def _numbers(progress: Progress) -> list[tuple[str, str]]:
    last = progress.metrics[-1]
    numbers = [
        ("step", f"{last['step']:,} of {last['num_steps']:,}"),
        ("loss", f"{running_mean([metrics['loss'] for metrics in progress.metrics])[-1]:.3f}"),
        ("tokens a second", f"{last['tokens_per_second']:,.0f}"),
    ]
    validation = [metrics["validation_loss"] for metrics in progress.metrics if "validation_loss" in metrics]
    if validation:
        numbers.append(("validation loss", f"{validation[-1]:.3f}"))
    if progress.state == "training" and progress.seconds_left is not None:
        numbers.append(("time left", in_words(progress.seconds_left)))
    return numbers


def _curves(progress: Progress) -> Markup:
    steps = [metrics["step"] for metrics in progress.metrics]
    losses = [metrics["loss"] for metrics in progress.metrics]
    lines = [
        Line("each step", "step", list(zip(steps, losses, strict=True))),
        Line("running mean", "tuned", list(zip(steps, running_mean(losses), strict=True))),
    ]
    validation = [
        (metrics["step"], metrics["validation_loss"])
        for metrics in progress.metrics
        if "validation_loss" in metrics
    ]
    if validation:
        lines.append(Line("validation", "mark", validation))
    return draw_lines(lines, x_label="step", y_label="Loss")
