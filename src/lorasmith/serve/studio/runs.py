"""The tab Runs: what was trained, how it compares, and what is to be had of it."""

import os
import shutil
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from lorasmith.errors import AdapterError, LorasmithError, RunError
from lorasmith.evaluation.charts import Line, draw_lines
from lorasmith.evaluation.report import PAGE_FILE
from lorasmith.export.quantise import QUANTS
from lorasmith.export.write import EXPORTED_FILE
from lorasmith.model.run_record import describe_run, list_runs, read_run_record
from lorasmith.serve.service import Service
from lorasmith.serve.studio import jobs
from lorasmith.serve.studio.pieces import fault, log, note, table
from lorasmith.serve.studio.places import Places
from lorasmith.training.reporters import read_metrics, running_mean

MAX_CURVES = 6
_LOOK_SECONDS = 2.0
_WITH_ADAPTER = ("run.json", "README.md")  # what goes into the zip beside adapter/

Refresh = Callable[[], tuple[Any, ...]]


def build_runs(places: Places, service: Service) -> tuple[list[Any], Refresh]:
    """Add the tab's contents to the page that is being built; return the parts that need refreshing, and how."""
    overview = gr.HTML(elem_id="runs-table")
    overlaid = gr.CheckboxGroup(
        [],
        label="Curves",
        info=f"Training loss of up to {MAX_CURVES} runs. Of answers, texts, pairs and labels it measures other things.",
        elem_id="runs-curves",
    )
    curves = gr.HTML(elem_id="runs-chart")
    run = gr.Dropdown([], label="Run", elem_id="runs-run")
    with gr.Row(elem_classes="buttons"):
        serve = gr.Button("Ask it in Chat", elem_id="runs-serve")
        report = gr.Button("Make the report", elem_id="runs-report")
        merge = gr.Button("Merge, with proof", elem_id="runs-merge")
        pack = gr.Button("Adapter as a zip", elem_id="runs-pack")
        download = gr.DownloadButton("Download", visible=False, elem_id="runs-download")
    with gr.Accordion("Export for llama.cpp and Ollama", open=False):
        with gr.Row(elem_classes="settings"):
            quant = gr.Dropdown(
                list(QUANTS),
                value="f16",
                label="Precision",
                info="f16 is half the size of f32, q8_0 half of that; q4_0 and q4_k_m are smallest and coarsest.",
                elem_id="runs-quant",
            )
            proves = gr.Checkbox(
                label="Ask llama.cpp too",
                info="The file is kept only if it answers as the merged model does.",
                elem_id="runs-proves",
            )
        export = gr.Button("Export", elem_id="runs-export")
        exported = gr.File(
            label="Exported", file_count="multiple", interactive=False, visible=False, elem_id="runs-exported"
        )
    said = gr.HTML(elem_id="runs-said")
    at_work = gr.HTML(elem_id="runs-work")
    page = gr.HTML(elem_id="runs-page")
    timer = gr.Timer(_LOOK_SECONDS)
    seen_work, seen_page, seen_files = gr.State(""), gr.State(""), gr.State([])

    def overlay(names: list[str]) -> str:
        try:
            return draw_curves(places, names)
        except LorasmithError as error:
            return fault(error)

    def look(name: str | None, work_before: str, page_before: str) -> tuple[Any, ...]:
        try:
            work, shown = (show_work(places, name), show_report(places, name)) if name else ("", "")
        except LorasmithError as error:
            work, shown = fault(error), ""
        return (
            *((gr.skip(), gr.skip()) if work == work_before else (work, work)),
            *((gr.skip(), gr.skip()) if shown == page_before else (shown, shown)),
        )

    def look_at_exported(name: str | None, before: list[str]) -> tuple[Any, Any]:
        try:
            files = list_exported(places, name) if name else []
        except LorasmithError:  # told by look
            files = []
        seen = [f"{file} {file.stat().st_mtime_ns}" for file in files]
        if seen == before:
            return gr.skip(), gr.skip()
        handed = hand_out(files, Path(exported.GRADIO_CACHE))
        return gr.File([str(file) for file in handed], visible=bool(handed)), seen

    def act(what: Callable[[Places, str], str], name: str | None) -> str:
        try:
            return note(what(places, name or ""))
        except LorasmithError as error:
            return fault(error)

    def offer(name: str | None) -> tuple[Any, Any]:
        try:
            file = pack_adapter(places, name or "", Path(download.GRADIO_CACHE))
        except LorasmithError as error:
            return gr.DownloadButton(visible=False), fault(error)
        shown = gr.DownloadButton(f"Download {file.name}", value=str(file), visible=True)
        return shown, note(f"{file.name}: {file.stat().st_size / 1e6:,.1f} MB.")

    overlaid.change(overlay, overlaid, curves, api_visibility="private")
    for looks, seen, shown in (
        (look, [seen_work, seen_page], [at_work, seen_work, page, seen_page]),
        (look_at_exported, [seen_files], [exported, seen_files]),
    ):
        gr.on(
            [timer.tick, run.change],
            looks,
            [run, *seen],
            shown,
            show_progress="hidden",
            trigger_mode="once",
            concurrency_limit=None,
            api_visibility="private",
        )
    # By the user's choice alone: when the list of runs is read again, what was just said of this run stays.
    run.input(
        lambda: (gr.DownloadButton(visible=False), ""), None, [download, said], api_visibility="private"
    )
    serve.click(lambda name: act(partial(serve_run, service), name), run, said, api_visibility="private")
    report.click(lambda name: act(start_report, name), run, said, api_visibility="private")
    merge.click(lambda name: act(start_merge, name), run, said, api_visibility="private")
    export.click(
        lambda name, quant, proves: act(partial(start_export, quant=quant, proves=proves), name),
        [run, quant, proves],
        said,
        api_visibility="private",
    )
    pack.click(offer, run, [download, said], api_visibility="private")

    def refresh() -> tuple[Any, ...]:
        rows = list_described(places)
        names = [row["name"] for row in rows]
        return show_table(rows), gr.CheckboxGroup(names), gr.Dropdown(names)

    return [overview, overlaid, run], refresh


def list_described(places: Places) -> list[dict[str, Any]]:
    """Return every run as plain values, the newest first; ``name`` is its folder below the folder of runs."""
    rows = []
    for folder, record in list_runs(places.runs) if places.runs.is_dir() else []:
        name = folder.relative_to(places.runs).as_posix()
        if isinstance(record, RunError):
            rows.append({"name": name, "state": "broken", "fault": str(record)})
        else:
            rows.append({**describe_run(folder, record), "name": name, "result": record.result or {}})
    return rows


def show_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the runs of :func:`list_described` as a table, and what is wrong with broken ones below it."""
    if not rows:
        return note("There are no runs yet. Start one in the tab Train.")
    cells = []
    for row in rows:
        loss, validation = row.get("final_loss"), row.get("validation_loss")
        cells.append(
            (
                Markup("<b>{}</b>").format(row["name"]),
                row["state"],
                "" if loss is None else f"{loss:.3f}",
                "" if validation is None else f"{validation:.3f}",
                row.get("num_examples") or "",
                row.get("result", {}).get("steps") or "",
                Path(row.get("base") or "").name,
                Path(row.get("data") or "").name,
                (row.get("created") or "")[:16].replace("T", " "),
            )
        )
    headings = ("run", "state", "loss", "validation", "examples", "steps", "base", "data", "begun (UTC)")
    faults = Markup("").join(
        Markup('<p class="bad">{}</p>').format(row["fault"]) for row in rows if "fault" in row
    )
    return table(headings, cells) + faults


def draw_curves(places: Places, names: Sequence[str]) -> str:
    """Return the losses of several runs as one chart.

    Raises:
        RunError: too many, or one of them is not there.
    """
    if len(names) > MAX_CURVES:
        raise RunError(f"{len(names)} runs are chosen; a chart that can be read has at most {MAX_CURVES}.")
    lines = []
    for number, name in enumerate(names):
        metrics = read_metrics(places.run(name) / "metrics.jsonl")
        means = running_mean([step["loss"] for step in metrics])
        lines.append(
            Line(name, f"run-{number}", list(zip([step["step"] for step in metrics], means, strict=True)))
        )
    return draw_lines(lines, x_label="step", y_label="Training loss, running mean")


def serve_run(service: Service, places: Places, name: str) -> str:
    """Load the run's adapter beside the others that are served; return what is to be said."""
    run_dir = _finished(places, name)
    if service.models.find(name) is not None:
        return f"{name} is served already: choose it in the tab Chat."
    service.load(name, run_dir)
    return f"{name} is served now: choose it in the tab Chat. Clients can ask for it by that name."


def start_report(places: Places, name: str) -> str:
    """Start the before/after report of a finished run; return what is to be said."""
    run_dir = _finished(places, name)
    jobs.start(run_dir, "report", ["report", "--run", str(run_dir)])
    return "The report is being made. It appears below when it is finished."


def start_merge(places: Places, name: str) -> str:
    """Start merging a finished run into ``merged/`` in its folder; return what is to be said."""
    run_dir = _finished(places, name)
    out = run_dir / "merged"
    jobs.start(run_dir, "merge", ["merge", "--run", str(run_dir), "--out", str(out), "--overwrite"])
    return f"Base and adapter are merged into {out}, and compared."


def start_export(places: Places, name: str, *, quant: str, proves: bool) -> str:
    """Start writing a finished run into ``exported/`` in its folder, as a .gguf with a Modelfile.

    Returns what is to be said.
    """
    run_dir = _finished(places, name)
    words = ["export", "--run", str(run_dir), "--to", "ollama", "--out", str(run_dir / "exported")]
    words += ["--quant", quant, "--overwrite", *(["--prove"] if proves else [])]
    jobs.start(run_dir, "export", words)
    return f"{name} is merged, and written as {quant}. Its files appear below when they are whole."


def list_exported(places: Places, name: str) -> list[Path]:
    """Return the files of the run's export; [] while there is none."""
    folder = places.run(name) / "exported"
    return sorted(file for file in folder.glob("*") if file.name != EXPORTED_FILE)


def hand_out(files: Sequence[Path], cache: Path) -> list[Path]:
    """Return ``files`` as Gradio may hand them out: in its cache, without a copy where the disk is the same one."""
    handed = []
    for file in files:
        folder = cache / "exported" / f"{file.stat().st_ino}-{file.stat().st_mtime_ns}"
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / file.name
        if not target.exists():
            try:
                os.link(file, target)
            except OSError:  # another disk, or one without links
                shutil.copyfile(file, target)
        handed.append(target)
    return handed


def _finished(places: Places, name: str) -> Path:
    run_dir = places.run(name)
    if read_run_record(run_dir).result is None:
        raise RunError(f"{name} has not been trained to its end. Go on with it in the tab Train.")
    return run_dir


def pack_adapter(places: Places, name: str, folder: Path) -> Path:
    """Write the run's adapter with its record into a zip below ``folder`` and return the file.

    Raises:
        AdapterError: the run has no adapter yet. RunError: there is no such run.
    """
    run_dir = places.run(name)
    record = read_run_record(run_dir)
    adapter = run_dir / "adapter"
    if record.result is None or not adapter.is_dir():
        raise AdapterError(f"{name} has no adapter yet. Train it to its end first.")
    target = folder / "downloads" / f"{run_dir.name}-adapter.zip"
    shutil.rmtree(target.parent, ignore_errors=True)
    target.parent.mkdir(parents=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as pack:  # weights do not get smaller
        for file in sorted(adapter.rglob("*")):
            if file.is_file():
                pack.write(file, f"{run_dir.name}/adapter/{file.relative_to(adapter).as_posix()}")
        for extra in _WITH_ADAPTER:
            if (run_dir / extra).is_file():
                pack.write(run_dir / extra, f"{run_dir.name}/{extra}")
    return target


def show_work(places: Places, name: str) -> str:
    """Return what the run's merge, export and report are doing, or said last."""
    run_dir = places.run(name)
    parts = []
    titles: dict[jobs.Kind, str] = {"merge": "Merge", "export": "Export", "report": "Report"}
    for kind, title in titles.items():
        said = jobs.read_log(run_dir, kind)
        if said:
            is_at_work = jobs.find(run_dir, kind) is not None
            state = "at work" if is_at_work else "failed" if jobs.has_failed(run_dir, kind) else "done"
            parts.append(
                Markup("<h3>{}: {}</h3>{}").format(title, state, log(said, label=f"{title}'s output"))
            )
    return Markup("").join(parts)


def show_report(places: Places, name: str) -> str:
    """Return the run's report as a frame that may run its own script and reach nothing else."""
    file = places.run(name) / PAGE_FILE
    if not file.is_file():
        return note(f"{name} has no report yet.")
    return Markup(
        '<iframe class="report" tabindex="0" title="Before and after: {}" sandbox="allow-scripts" srcdoc="{}"></iframe>'
    ).format(name, file.read_text(encoding="utf-8"))
