"""``lorasmith evaluate``: loss, right answers, ROUGE-L and chrF of whatever can be asked, on one file."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from lorasmith.cli.asking import asking_progress
from lorasmith.cli.console import console, tell
from lorasmith.cli.options import refuse_ignored
from lorasmith.errors import SettingsError

if TYPE_CHECKING:
    from lorasmith.evaluation.answers import AnswersReport
    from lorasmith.evaluation.harness import TaskScore
    from lorasmith.evaluation.perplexity import Surprise
    from lorasmith.evaluation.questions import EvaluationRow
    from lorasmith.evaluation.store import KeptChat


def command(
    run: Annotated[Path | None, typer.Option(help="Run folder or adapter folder.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A whole model: a merged folder, a base's folder, .gguf file or Hub id."),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(help="URL of an OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Questions with reference answers: any data file; rows may have keywords."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-eval, by comma: names or .yaml files of your own. Extra lm-eval."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Measure the untuned base of a run as well.")
    ] = False,
    endpoint_model: Annotated[
        str | None, typer.Option(help="Model to ask at the endpoint. Default: the first that it lists.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Longest answer, in tokens. Default: half as long again as the longest reference."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Most questions of --data, and of each of --tasks.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File for every answer and number, as JSON.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Where a run's base model lies, if it was moved.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Measure a model on questions whose answers are known.

    A row is right by its keywords, or by exact match, or by ROUGE-L and chrF where it has none. Counts come with
    their 95% interval. Answers are kept, so that a second call asks only what is new.
    """
    if sum(source is not None for source in (run, model, endpoint)) != 1:
        raise SettingsError("Name one thing to evaluate: --run RUN, --model DIR, or --endpoint URL.")
    if data is None and tasks is None:
        raise SettingsError("Nothing to ask: name --data FILE, or --tasks NAMES, or both.")
    if endpoint is None and endpoint_model is not None:
        raise SettingsError(
            f"--endpoint-model {endpoint_model} is asked at an endpoint. Add --endpoint URL, or leave it out."
        )
    if endpoint is not None and tasks is not None:
        raise SettingsError(
            "--tasks needs the model's probabilities, which an endpoint does not give: use --run."
        )
    if endpoint is not None and compare:
        raise SettingsError("--compare needs a run: an endpoint does not say what its base is.")
    if endpoint is not None:
        refuse_ignored("--endpoint", base_model=base_model, device=device, dtype=dtype)
    from lorasmith.evaluation.questions import read_evaluation_rows, spread_evenly
    from lorasmith.model.run_record import read_run_record

    kind = read_run_record(run).row_kind if run is not None and (run / "run.json").is_file() else "answers"
    rows = read_evaluation_rows(data, kind) if data is not None else []
    rows = spread_evenly(rows, limit) if limit is not None else rows
    results: dict[str, dict[str, Any]] = {}
    if endpoint is not None:
        results["endpoint"] = _evaluate_endpoint(endpoint, endpoint_model, rows, max_tokens)
    else:
        from lorasmith.evaluation.store import KeptChat
        from lorasmith.generation.chat import open_chat

        chat = open_chat(str(run or model), device=device, dtype=dtype, base=base_model, tell=tell)
        for note in chat.notes:
            tell(note)
        sides = {"tuned" if chat.found and chat.found.adapter else "model": KeptChat(chat)}
        if compare or (tasks is not None and chat.found and chat.found.adapter):
            sides = {"base": KeptChat(chat.base()), **sides}
        for name, side in sides.items():
            results[name] = _evaluate_chat(name, side, rows, max_tokens)
        if tasks is not None:
            for name, side in sides.items():
                results[name]["tasks"] = _run_tasks(name, side, tasks.split(","), limit)
    _print_answers(results)
    _print_tasks(results)
    if out is not None:
        from lorasmith.files import write_whole

        write_whole(out, json.dumps({name: _as_json(r) for name, r in results.items()}, indent=2) + "\n")
        console.print(f"Every answer: [bold]{escape(str(out))}[/]", soft_wrap=True)


def _evaluate_chat(
    name: str, side: "KeptChat", rows: "list[EvaluationRow]", max_tokens: int | None
) -> dict[str, Any]:
    if not rows:
        return {}
    from lorasmith.evaluation.answers import choose_max_tokens
    from lorasmith.evaluation.perplexity import answer_surprise
    from lorasmith.evaluation.settings import ReportSettings

    longest = max_tokens or choose_max_tokens(rows, ReportSettings(), side.chat.tokenizer)
    return {"answers": _ask(side, name, rows, longest), "surprise": answer_surprise(side.chat, rows)}


def _evaluate_endpoint(
    url: str, model: str | None, rows: "list[EvaluationRow]", max_tokens: int | None
) -> dict[str, Any]:
    from lorasmith.evaluation.endpoint import Endpoint

    side = Endpoint(url, model=model)
    console.print(f"[dim]Asking {escape(side.name)}[/]", soft_wrap=True)
    return {"answers": _ask(side, "the endpoint", rows, max_tokens or 256), "surprise": None}


def _ask(side: Any, name: str, rows: "list[EvaluationRow]", max_tokens: int) -> "AnswersReport":
    from lorasmith.evaluation.answers import evaluate_answers
    from lorasmith.generation.sampling import SamplingSettings

    with asking_progress() as progress:
        return evaluate_answers(
            side,
            rows,
            sampling=SamplingSettings(max_tokens=max_tokens),
            progress=lambda done, total: progress(name, done, total),
        )


def _run_tasks(name: str, side: "KeptChat", tasks: Iterable[str], limit: int | None) -> "list[TaskScore]":
    from lorasmith.evaluation.harness import run_tasks

    console.print(f"[dim]lm-eval on {name} ...[/]")
    return run_tasks(side.chat, [task.strip() for task in tasks], limit=limit)


def _print_answers(results: dict[str, dict[str, Any]]) -> None:
    answered = {name: result for name, result in results.items() if "answers" in result}
    if not answered:
        return
    table = Table("", *answered, box=None, pad_edge=False)

    def row(title: str, values: Iterable[str], style: str | None = None) -> None:
        table.add_row(title, *values, style=style)

    reports: list[AnswersReport] = [result["answers"] for result in answered.values()]
    surprises: list[Surprise | None] = [result["surprise"] for result in answered.values()]
    row("right answers", [f"{report.right}" for report in reports], style="bold")
    row("  95% interval", ["{:.0%} to {:.0%}".format(*report.right.interval()) for report in reports])
    if any(report.with_keywords.n for report in reports):
        row("  of rows with keywords", [f"{report.with_keywords}" for report in reports])
    row("exact match", [f"{report.verbatim}" for report in reports])
    row("ROUGE-L (0 to 1)", [f"{report.mean_rouge_l:.3f}" for report in reports])
    row("chrF (0 to 100)", [f"{report.mean_chrf:.1f}" for report in reports])
    row("ended by themselves", [f"{report.stopped}" for report in reports])
    unknown = "not known of an endpoint"
    row("loss on the references", [f"{s.loss:.3f}" if s else unknown for s in surprises])
    row("perplexity on the references", [f"{s.perplexity:,.1f}" if s else unknown for s in surprises])
    console.print(table)
    if len(reports) == 2:
        _print_comparison(*reports)


def _print_comparison(base: "AnswersReport", tuned: "AnswersReport") -> None:
    from lorasmith.evaluation.answers import compare_answers
    from lorasmith.evaluation.settings import ReportSettings
    from lorasmith.evaluation.verdict import judge_against_base

    console.print(judge_against_base(compare_answers(base, tuned), ReportSettings()).text)


def _print_tasks(results: dict[str, dict[str, Any]]) -> None:
    sides = {name: result["tasks"] for name, result in results.items() if "tasks" in result}
    if not sides:
        return
    table = Table("task", "metric", *sides, box=None, pad_edge=False)
    for scores in zip(*sides.values(), strict=True):
        shown = [f"{s.value:.4f}" + (f" ± {s.stderr:.4f}" if s.stderr is not None else "") for s in scores]
        table.add_row(scores[0].task, scores[0].metric, *shown)
    console.print(table)
    console.print("[dim]± is one standard error, as lm-eval estimates it.[/]")


def _as_json(result: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if "answers" in result:
        values |= result["answers"].to_json()
        values["surprise"] = result["surprise"] and result["surprise"].to_json()
    if "tasks" in result:
        values["tasks"] = [asdict(score) for score in result["tasks"]]
    return values
