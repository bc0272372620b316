"""Everything that is known of a run, measured once and told three times: report.json, report.html, README.md.

run folder -> questions, training data -> base, tuned, merged are asked -> counts -> verdict
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorasmith.errors import RunError
from lorasmith.evaluation.answers import (
    AnswersReport,
    choose_max_tokens,
    compare_answers,
    evaluate_answers,
    longest_reference,
)
from lorasmith.evaluation.held_out import QuestionSet, TrainingData, choose_questions, sample_training
from lorasmith.evaluation.overlap import Copying, measure_copying
from lorasmith.evaluation.perplexity import Surprise, answer_surprise, text_surprise
from lorasmith.evaluation.probe import PROBE_TOKENS, general_questions, general_text
from lorasmith.evaluation.questions import EvaluationRow
from lorasmith.evaluation.settings import ReportSettings
from lorasmith.evaluation.statistics import Comparison
from lorasmith.evaluation.store import KeptChat
from lorasmith.evaluation.texts import HeldOutText, read_held_out_text
from lorasmith.evaluation.verdict import (
    Reason,
    Verdict,
    decide,
    judge_against_base,
    judge_forgetting,
    judge_held_out_text,
    judge_leakage,
    judge_merged,
    judge_right,
    judge_stopping,
    judge_text,
    judge_validation,
)
from lorasmith.export.merge import MERGED_TO_FILE
from lorasmith.files import write_whole
from lorasmith.generation.chat import Chat, open_chat
from lorasmith.generation.sampling import SamplingSettings
from lorasmith.model.found import MERGED_FILE, Tell, fingerprint_adapter, say_nothing
from lorasmith.model.run_record import RunRecord, how_to_finish, library_versions, read_run_record
from lorasmith.training.reporters import read_metrics

REPORT_FILE, PAGE_FILE = "report.json", "report.html"
SCHEMA_VERSION = 1

MISSING_HELD_OUT = (
    "Nothing was held out, so nobody knows whether the model answers questions that it was not trained on. Write 20 "
    "or more new questions with their answers, in the format of the training data, and name the file: "
    "lorasmith report --run RUN --data FILE (or report.data in the run file). training.validation_share=0.1 holds "
    "out a share of the data before training."
)

MISSING_TEXT = (
    "Nothing was held out, so nobody knows whether the model has learnt more than these very texts. "
    "training.validation_share=0.1 holds out documents before training; data.validation names other texts. Questions "
    "with answers can be asked as well: lorasmith report --run RUN --data FILE."
)

Progress = Callable[[str, int, int], None]  # what is asked, answers done, answers asked for


_NO_TEXT = Reason("Held-out text", "look closer", "no text was held out", MISSING_TEXT)


@dataclass(frozen=True)
class HeldOut:
    """The questions that the run is judged by, as each side answered them; all tuples are in the rows' order."""

    sets: tuple[QuestionSet, ...]
    rows: tuple[EvaluationRow, ...]
    max_tokens: int
    longest_reference: int  # in tokens
    base: AnswersReport
    tuned: AnswersReport
    merged: AnswersReport | None
    base_surprise: Surprise
    tuned_surprise: Surprise
    copying: tuple[Copying, ...] | None  # of the tuned answers; None: the training data is gone

    @property
    def compared(self) -> Comparison:
        return compare_answers(self.base, self.tuned)

    def set_places(self) -> list[tuple[QuestionSet, slice]]:
        """Return each set with its place in the rows."""
        places, start = [], 0
        for question_set in self.sets:
            places.append((question_set, slice(start, start + len(question_set.rows))))
            start += len(question_set.rows)
        return places


@dataclass(frozen=True)
class Probe:
    """What was forgotten: general questions and a general text, before and after."""

    rows: tuple[EvaluationRow, ...]
    base: AnswersReport
    tuned: AnswersReport
    base_text: Surprise
    tuned_text: Surprise

    @property
    def compared(self) -> Comparison:
        return compare_answers(self.base, self.tuned)


@dataclass(frozen=True)
class Report:
    """One run, judged. ``notes`` say what could not be looked at; ``versions`` are of the libraries that asked."""

    record: RunRecord
    settings: ReportSettings
    verdict: Verdict
    held_out: HeldOut | None
    text: HeldOutText | None  # of a run on plain texts
    trained: AnswersReport | None  # training questions, asked of the tuned model
    trained_of: int  # how many there are
    probe: Probe
    metrics: tuple[dict[str, Any], ...]
    receipt: dict[str, Any] | None
    merged_folder: str | None
    notes: tuple[str, ...]
    num_parameters: tuple[int, int]  # trained, frozen
    seconds: float  # that asking took
    versions: dict[str, str]


def make_report(
    run_dir: Path,
    settings: ReportSettings,
    *,
    merged: Path | None = None,
    base: str | None = None,
    device: str = "auto",
    tell: Tell = say_nothing,
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """Ask base, tuned and merged model, judge the answers and decide.

    ``merged`` is a folder that ``merge`` wrote; else the last one the run was merged to, while it is there. ``base``
    is where the base model lies now, if it was moved. Answers that are kept from an earlier report are not asked
    for again.

    Raises:
        RunError: the run is not finished, or ``merged`` is of another adapter. DataError: a held-out file is wrong.
    """
    started = time.monotonic()
    record = read_run_record(run_dir)
    if record.result is None:
        raise RunError(f"The run {run_dir} has not been trained to its end. {how_to_finish(run_dir)}")
    merged = merged or _last_merge(run_dir)
    if merged is not None:
        _check_merge(merged, run_dir)
    training = TrainingData(run_dir, record)
    notes = [training.note] if training.note else []

    tuned = KeptChat(Chat.from_run(run_dir, device=device, base=base, tell=tell))
    untuned = tuned.base()
    tokenizer = tuned.chat.tokenizer
    sets = choose_questions(run_dir, record, training, settings, tuned.chat.recipe, tokenizer)
    rows = [row for question_set in sets for row in question_set.rows]
    is_of_texts = record.row_kind == "documents"
    num_answers = training.count_answers()
    trained_rows = []  # texts are no questions
    if not is_of_texts:
        trained_rows = sample_training(training.answers(), num_answers, settings.max_training_questions)

    def ask(side: KeptChat, name: str, some: Sequence[EvaluationRow], max_tokens: int) -> AnswersReport:
        return evaluate_answers(
            side,
            some,
            sampling=SamplingSettings(max_tokens=max_tokens),
            settings=settings,
            progress=lambda done, total: progress(name, done, total),
        )

    held_out = None
    max_tokens = choose_max_tokens([*rows, *trained_rows], settings, tokenizer)
    longest = longest_reference(rows or trained_rows, tokenizer)
    if rows:
        tuned_answers = ask(tuned, "tuned, held-out questions", rows, max_tokens)
        texts = [answer.answer for answer in tuned_answers.records]
        held_out = HeldOut(
            sets=sets,
            rows=tuple(rows),
            max_tokens=max_tokens,
            longest_reference=longest,
            base=ask(untuned, "base, held-out questions", rows, max_tokens),
            tuned=tuned_answers,
            merged=None,
            base_surprise=_surprise_by_answers(untuned, rows),
            tuned_surprise=_surprise_by_answers(tuned, rows),
            copying=tuple(measure_copying(texts, training.answers())) if training.is_there else None,
        )
    trained = ask(tuned, "tuned, training questions", trained_rows, max_tokens) if trained_rows else None
    general = general_questions()
    text = read_held_out_text(run_dir, record, untuned, tuned, settings) if is_of_texts else None
    probe = Probe(
        rows=tuple(general),
        base=ask(untuned, "base, general questions", general, PROBE_TOKENS),
        tuned=ask(tuned, "tuned, general questions", general, PROBE_TOKENS),
        base_text=_surprise_by_text(untuned),
        tuned_text=_surprise_by_text(tuned),
    )
    with tuned.chat.answering() as model:
        sizes = [(p.numel(), "lora_" in name) for name, p in model.named_parameters()]
    num_parameters = (  # runs that are older do not say it themselves; they are LoRA's
        record.result.get("trainable_numbers", sum(n for n, new in sizes if new)),
        record.result.get("frozen_numbers", sum(n for n, new in sizes if not new)),
    )
    if merged is not None and held_out is not None:
        del tuned, untuned, model  # a large model fits into memory once
        merged_chat = KeptChat(open_chat(merged, device=device, tell=tell))
        answers = ask(merged_chat, "merged, held-out questions", rows, max_tokens)
        held_out = replace(held_out, merged=answers)

    metrics = read_metrics(run_dir / "metrics.jsonl")
    receipt = _read_json(run_dir / "receipt.json")
    reasons = [judge_held_out_text(text, settings) if text else _NO_TEXT] if is_of_texts else []
    reasons += _find_reasons(
        held_out,
        trained,
        probe,
        metrics,
        settings,
        {
            "truncated": (receipt or {}).get("truncated", 0),
            "max_tokens": max_tokens,
            "longest_reference": longest,
        },
        needs_questions=not is_of_texts,
    )
    if num_leaked := sum(len(question_set.leaked) for question_set in sets) if held_out is None else 0:
        notes.append(
            f"All {num_leaked} held-out questions stand in the training data as well: none is left to ask."
        )
    return Report(
        record=record,
        settings=settings,
        verdict=decide(reasons),
        held_out=held_out,
        text=text,
        trained=trained,
        trained_of=num_answers,
        probe=probe,
        metrics=tuple(metrics),
        receipt=receipt,
        merged_folder=str(merged) if merged is not None and held_out is not None else None,
        notes=tuple(notes),
        num_parameters=num_parameters,
        seconds=round(time.monotonic() - started, 1),
        versions=library_versions(),
    )


def _find_reasons(
    held_out: HeldOut | None,
    trained: AnswersReport | None,
    probe: Probe,
    metrics: Sequence[dict[str, Any]],
    settings: ReportSettings,
    stopping: dict[str, int],
    *,
    needs_questions: bool,
) -> list[Reason]:
    """Return what was looked at, each with how grave it is."""
    reasons = []
    if held_out is not None:
        reasons += [
            judge_right(
                held_out.tuned.right, trained and trained.right, held_out.tuned.with_keywords, settings
            ),
            judge_against_base(held_out.compared, settings),
            judge_stopping(held_out.tuned.stopped, settings, stopping),
        ]
        if held_out.merged is not None:
            reasons.append(judge_merged(held_out.tuned, held_out.merged))
        if leaked := sum(len(question_set.leaked) for question_set in held_out.sets):
            reasons.append(judge_leakage(leaked, len(held_out.rows)))
    elif needs_questions:
        reasons.append(
            Reason("Right answers", "look closer", "nothing was held out to ask", MISSING_HELD_OUT)
        )
        if trained is not None:
            reasons.append(judge_stopping(trained.stopped, settings, stopping))
    reasons.append(judge_forgetting(probe.compared, settings))
    reasons.append(judge_text(probe.base_text, probe.tuned_text, settings))
    if validation := judge_validation(metrics):
        reasons.append(validation)
    return reasons


def write_report(run_dir: Path, report: Report) -> Path:
    """Write report.json, report.html and README.md into the run folder; return the page."""
    from lorasmith.evaluation.page import render_page
    from lorasmith.export.card import write_card

    values = json.dumps(to_json(report), indent=2, ensure_ascii=False, allow_nan=False)
    write_whole(run_dir / REPORT_FILE, values + "\n")
    write_whole(run_dir / PAGE_FILE, render_page(report))
    write_card(run_dir)
    return run_dir / PAGE_FILE


def to_json(report: Report) -> dict[str, Any]:
    """Return every fact of the page as plain values; a perplexity beyond all numbers is None."""
    return {
        "schema_version": SCHEMA_VERSION,
        "run": report.record.model_dump(mode="json"),
        "settings": report.settings.model_dump(mode="json"),
        "verdict": asdict(report.verdict),
        "held_out": report.held_out and _held_out_json(report.held_out),
        "text": report.text and report.text.to_json(),
        "trained": report.trained and {"of": report.trained_of, **report.trained.to_json()},
        "probe": {
            "base": report.probe.base.to_json(),
            "tuned": report.probe.tuned.to_json(),
            "compared": _comparison_json(report.probe.compared),
            "base_text": report.probe.base_text.to_json(),
            "tuned_text": report.probe.tuned_text.to_json(),
        },
        "metrics": list(report.metrics),
        "receipt": report.receipt,
        "merged_folder": report.merged_folder,
        "notes": list(report.notes),
        "num_parameters": {"trained": report.num_parameters[0], "frozen": report.num_parameters[1]},
        "seconds": report.seconds,
        "versions": report.versions,
    }


def _held_out_json(held_out: HeldOut) -> dict[str, Any]:
    sides = {"base": held_out.base, "tuned": held_out.tuned, "merged": held_out.merged}
    return {
        "sets": [
            {
                "name": question_set.name,
                "kind": question_set.kind,
                "rows": question_set.num_rows,
                "asked": len(question_set.rows),
                "leaked": [asdict(leak) for leak in question_set.leaked],
            }
            for question_set in held_out.sets
        ],
        "keywords": [row.keywords for row in held_out.rows],
        "where": [row.where for row in held_out.rows],
        "max_tokens": held_out.max_tokens,
        "longest_reference": held_out.longest_reference,
        **{name: side and side.to_json() for name, side in sides.items()},
        "compared": _comparison_json(held_out.compared),
        "base_surprise": held_out.base_surprise.to_json(),
        "tuned_surprise": held_out.tuned_surprise.to_json(),
        "copying": held_out.copying and [asdict(copying) for copying in held_out.copying],
    }


def _comparison_json(compared: Comparison) -> dict[str, Any]:
    return {**asdict(compared), "p_value": compared.p_value}


def _surprise_by_answers(side: KeptChat, rows: Sequence[EvaluationRow]) -> Surprise:
    what = ["answers", [[row.reference, side.chat.encode_prompt(row.asked)] for row in rows]]
    return Surprise(**side.remember(what, lambda: asdict(answer_surprise(side.chat, rows))))


def _surprise_by_text(side: KeptChat) -> Surprise:
    passages = general_text()
    return Surprise(**side.remember(["text", passages], lambda: asdict(text_surprise(side.chat, passages))))


def _last_merge(run_dir: Path) -> Path | None:
    """Return the folder that the run was last merged to, if it is there and still of this adapter."""
    noted = _read_json(run_dir / MERGED_TO_FILE)
    folder = Path(noted["folder"]) if noted else None
    if folder is None or not (folder / MERGED_FILE).is_file():
        return None
    return folder if _merged_adapter(folder) == fingerprint_adapter(run_dir / "adapter") else None


def _check_merge(merged: Path, run_dir: Path) -> None:
    if not (merged / MERGED_FILE).is_file():
        raise RunError(f"{merged} was not written by lorasmith merge: it has no {MERGED_FILE}.")
    if _merged_adapter(merged) != fingerprint_adapter(run_dir / "adapter"):
        raise RunError(
            f"{merged} is a merge of another adapter than {run_dir / 'adapter'}. Merge the run again: lorasmith merge."
        )


def _merged_adapter(folder: Path) -> str | None:
    values = _read_json(folder / MERGED_FILE) or {}
    return values.get("adapter", {}).get("sha256")


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
