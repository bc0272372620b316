"""report.html: one page that needs nothing beside itself, for a reader who has trained one model so far."""

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import median
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lorasmith.evaluation.answers import AnswerRecord
from lorasmith.evaluation.charts import Lengths, Line, draw_lengths, draw_lines, draw_share
from lorasmith.evaluation.overlap import RUN_WORDS, Copying
from lorasmith.evaluation.questions import EvaluationRow, name_keywords
from lorasmith.evaluation.report import HeldOut, Report
from lorasmith.evaluation.settings import ReportSettings
from lorasmith.evaluation.statistics import Count
from lorasmith.training.reporters import running_mean

_KINDS = (
    ("all", "all"),
    ("right", "right"),
    ("wrong", "wrong"),
    ("gained", "became right"),
    ("lost", "became wrong"),
    ("cut", "cut off"),
    ("merged", "merged differs"),
)


def render_page(report: Report) -> str:
    """Return the page as HTML text: styles, script and charts inside, and a policy that forbids any request."""
    held_out = report.held_out
    page = {
        "record": report.record,
        "verdict": report.verdict,
        "notes": report.notes,
        "settings": report.settings,
        "held_out": held_out,
        "text": report.text,
        "trained": report.trained,
        "trained_of": report.trained_of,
        "probe": report.probe,
        "probe_compared": report.probe.compared,
        "forgotten": _forgotten(report),
        "charts": _charts(report),
        "origin": _origin(report),
        "receipt": _receipt(report.receipt),
        "run_settings": [
            (f"{section}.{key}", value)
            for section, values in report.record.settings.items()
            for key, value in values.items()
        ],
        "thresholds": [
            (f"report.{name}", getattr(report.settings, name), field.description)
            for name, field in ReportSettings.model_fields.items()
        ],
        "draw_share": draw_share,
        "number": _number,
    }
    if held_out is not None:
        page |= _held_out_part(held_out, is_of_texts=report.record.row_kind == "documents")
    return _environment().get_template("page.jinja").render(page)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    loader = PackageLoader("lorasmith.evaluation", "templates")
    return Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )


def _held_out_part(held_out: HeldOut, *, is_of_texts: bool) -> dict[str, Any]:
    questions = [_question(held_out, place) for place in range(len(held_out.rows))]
    used = {kind for question in questions for kind in question["kinds"]}
    return {
        "sets": [_set(held_out, *at) for at in held_out.set_places()],
        "compared": held_out.compared,
        "judged": _how_judged(held_out.tuned.records),
        "questions": questions,
        "kinds": [(kind, name) for kind, name in _KINDS if kind == "all" or kind in used],
        "medians": [(group.name, round(median(group.words))) for group in _lengths(held_out)],
        "copied": _copied(held_out, is_of_texts),
        "leaked": [leak for question_set in held_out.sets for leak in question_set.leaked],
        "searched": held_out.copying and ("training texts" if is_of_texts else "training data"),
    }


def _set(held_out: HeldOut, question_set: Any, place: slice) -> dict[str, Any]:
    def right(records: Sequence[AnswerRecord]) -> Count:
        return Count(sum(record.is_right for record in records[place]), len(records[place]))

    stopped = [record.finish_reason == "stop" for record in held_out.tuned.records[place]]
    return {
        "name": question_set.name,
        "kind": question_set.kind,
        "num_rows": question_set.num_rows,
        "asked": len(question_set.rows),
        "base": right(held_out.base.records),
        "tuned": right(held_out.tuned.records),
        "merged": held_out.merged and right(held_out.merged.records),
        "stopped": Count(sum(stopped), len(stopped)),
    }


def _question(held_out: HeldOut, place: int) -> dict[str, Any]:
    row = held_out.rows[place]
    base, tuned = held_out.base.records[place], held_out.tuned.records[place]
    merged = held_out.merged and held_out.merged.records[place]
    kinds = ["right" if tuned.is_right else "wrong"]
    if base.is_right != tuned.is_right:
        kinds.append("gained" if tuned.is_right else "lost")
    if tuned.finish_reason == "length":
        kinds.append("cut")
    if merged and merged.answer != tuned.answer:
        kinds.append("merged")
    copying = None if held_out.copying is None else held_out.copying[place]
    sides = [_side("base", base), _side("tuned", tuned, copying)]
    if merged:
        sides.append({**_side("merged", merged), "is_repeated": merged.answer == tuned.answer})
    return {
        "question": _asked(row),
        "reference": row.reference,
        "keywords": name_keywords(row.keywords),
        "where": row.where,
        "kinds": kinds,
        "sides": sides,
    }


def _side(name: str, record: AnswerRecord, copying: Copying | None = None) -> dict[str, Any]:
    likeness = (
        f"ROUGE-L {record.rouge_l:.2f}, chrF {record.chrf:.0f}" if record.judged_by == "likeness" else ""
    )
    copied = f"the whole of the training answer {copying.whole_of}" if copying and copying.whole_of else ""
    return {
        "name": name,
        "answer": record.answer.strip(),
        "is_repeated": False,
        "is_right": record.is_right,
        "is_cut": record.finish_reason == "length",
        "likeness": likeness,
        "copied": copied,
    }


def _asked(row: EvaluationRow) -> str:
    """Return the question; of a conversation, the turns before it too."""
    turns = [message for message in row.asked[:-1] if message.role != "system"]
    before = [f"{message.role}: {message.content}" for message in turns]
    return "\n".join([*before, f"user: {row.question}"]) if before else row.question


def _how_judged(records: Sequence[AnswerRecord]) -> str:
    by_keywords = sum(record.judged_by == "keywords" for record in records)
    if by_keywords == len(records):
        return "An answer is right when it has all keywords of its row."
    if by_keywords == 0:
        return (
            "These rows have no keywords: an answer is right when it has the reference's numbers, names and dates "
            "and is like it, so the same in other words counts as wrong."
        )
    return f"{by_keywords} rows have keywords that an answer must have; the others are judged by likeness."


def _forgotten(report: Report) -> list[tuple[str, list[dict[str, str]]]]:
    groups: dict[str, list[dict[str, str]]] = {"Lost": [], "Gained": []}
    for row, base, tuned in zip(
        report.probe.rows, report.probe.base.records, report.probe.tuned.records, strict=True
    ):
        if base.is_right != tuned.is_right:
            group = groups["Lost" if base.is_right else "Gained"]
            group.append(
                {"question": row.question, "base": base.answer.strip(), "tuned": tuned.answer.strip()}
            )
    return [(title, rows) for title, rows in groups.items() if rows]


def _copied(held_out: HeldOut, is_of_texts: bool) -> str:
    if held_out.copying is None:
        return "The training data is not where it was, so copying and leakage were not looked for."
    pairs = list(zip(held_out.copying, held_out.tuned.records, strict=True))
    whole = Count(sum(copying.whole_of is not None for copying, _ in pairs), len(pairs))
    wrong = sum(copying.whole_of is not None and not record.is_right for copying, record in pairs)
    share = sum(copying.share for copying, _ in pairs) / len(pairs)
    if is_of_texts:
        return (
            f"{share:.0%} of the words of the tuned answers stand in runs of {RUN_WORDS} or more that a training text "
            "has too: the model quotes them."
        )
    return (
        f"{whole} of the tuned answers are a training answer from beginning to end, {wrong} of them as the answer to "
        f"the wrong question. {share:.0%} of their words stand in runs of {RUN_WORDS} or more that a training answer "
        "has too. For facts that have one good wording this is wanted; for free text it means that the model repeats."
    )


def _lengths(held_out: HeldOut) -> list[Lengths]:
    def count(texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    return [
        Lengths("references", "reference", count([row.reference for row in held_out.rows])),
        Lengths("tuned", "tuned", count([record.answer for record in held_out.tuned.records])),
        Lengths("base", "base", count([record.answer for record in held_out.base.records])),
    ]


_LOSS_SAYS = {
    "answers": "how much the training answers surprise it",
    "documents": "how much the training texts surprise it",
    "pairs": "how far it is from preferring the chosen answers",
    "labelled": "how far it is from telling good answers from bad ones",
}


def _charts(report: Report) -> dict[str, Any]:
    charts: dict[str, Any] = {"loss": "", "speed": "", "rate": "", "lengths": ""}
    if report.held_out is not None:
        charts["lengths"] = draw_lengths(_lengths(report.held_out))
    metrics = report.metrics
    if metrics:
        steps = [(m["step"], m["loss"]) for m in metrics]
        means = list(
            zip([m["step"] for m in metrics], running_mean([m["loss"] for m in metrics]), strict=True)
        )
        lines = [Line("each step", "step", steps), Line("running mean", "tuned", means)]
        validation = [(m["step"], m["validation_loss"]) for m in metrics if "validation_loss" in m]
        if validation:
            lines.append(Line("validation", "mark", validation))
        says = _LOSS_SAYS[report.record.row_kind]
        charts["loss"] = draw_lines(lines, x_label="step", y_label=f"Loss: {says}")
        speeds = [(m["step"], m["tokens_per_second"]) for m in metrics]
        charts["speed"] = draw_lines(
            [Line("speed", "tuned", speeds)], x_label="step", y_label="Tokens a second"
        )
        rates = [(m["step"], m["learning_rate"]) for m in metrics]
        charts["rate"] = draw_lines([Line("rate", "tuned", rates)], x_label="step", y_label="Learning rate")
    return charts


def _origin(report: Report) -> list[tuple[str, Any]]:
    record, result = report.record, report.record.result or {}
    revision = f" at {record.base.revision}" if record.base.revision else ""
    trained, frozen = report.num_parameters
    seconds = result.get("training_seconds")
    rows = [
        ("Base", f"{record.base.id}{revision}"),
        ("Fingerprint of its weights", record.base.fingerprint),
        ("Adapter", f"{trained:,} trained numbers beside {frozen:,} frozen ones"),
        ("Training data", record.data["source"]),
        ("Fingerprint of the data", record.data["fingerprint"]),
        ("Prompt recipe", record.recipe.get("name")),
        ("Training time", None if seconds is None else f"{seconds:,.0f} s in {result['steps']:,} steps"),
        ("Tokens computed", f"{result['tokens']:,}" if "tokens" in result else None),
        ("Energy, cost", "not measured"),
        ("Merged model", report.merged_folder or "none found"),
        ("Trained", record.created),
        ("Trained with", ", ".join(f"{name} {number}" for name, number in record.versions.items())),
        ("Asked with", ", ".join(f"{name} {number}" for name, number in report.versions.items())),
        ("Asking for this report took", f"{report.seconds:,.0f} s, without what was asked before"),
    ]
    return [(name, value) for name, value in rows if value is not None]


def _receipt(receipt: dict[str, Any] | None) -> list[tuple[str, str]]:
    if receipt is None:
        return []
    pieces = f", as {receipt['pieces']:,} pieces" if receipt.get("pieces") else ""
    rows = [("read", f"{receipt['rows_read']:,}"), ("used", f"{receipt['used']:,}{pieces}")]
    for fate in ("skipped", "failed"):
        rows += [(f"{fate}: {reason}", f"{number:,}") for reason, number in receipt[fate].items()]
    if receipt["truncated"]:
        rows.append(("used, but cut", f"{receipt['truncated']:,}"))
    return rows


def _number(value: float) -> str:
    return f"{value:,.1f}" if math.isfinite(value) and value < 1e6 else "beyond a million"
