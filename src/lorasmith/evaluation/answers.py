"""Ask questions whose answers are known, and count."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorasmith.data.example import Message
from lorasmith.data.sources import BlankLine, RowFault, read_rows
from lorasmith.errors import DataError
from lorasmith.evaluation.facts import has_keywords, is_verbatim, states_facts
from lorasmith.generation.chat import GREEDY, Chat
from lorasmith.generation.sampling import SamplingSettings
from lorasmith.generation.stream import Answer, FinishReason


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """A question with its reference answer, and the keywords of a right answer if somebody chose them."""

    question: str
    reference: str
    keywords: tuple[str, ...] = ()
    input: str = ""


@dataclass(frozen=True, slots=True)
class AnswerRecord:
    """One question as it was answered. ``is_right``: has the keywords, or states the facts without any."""

    question: str
    reference: str
    answer: str
    is_right: bool
    is_verbatim: bool
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Count:
    """k of n."""

    k: int
    n: int

    @property
    def share(self) -> float:
        return self.k / self.n if self.n else 0.0

    def __str__(self) -> str:
        percent = round(100 * self.share)
        if 0 < self.k < self.n:  # 199 of 200 is not 100%
            percent = min(99, max(1, percent))
        return f"{self.k} of {self.n} ({percent}%)"


@dataclass(frozen=True, slots=True)
class AnswersReport:
    """What became of every question, in the order asked."""

    records: tuple[AnswerRecord, ...]

    @property
    def right(self) -> Count:
        return self._count([record.is_right for record in self.records])

    @property
    def verbatim(self) -> Count:
        """Answers that are the reference word for word."""
        return self._count([record.is_verbatim for record in self.records])

    @property
    def stopped(self) -> Count:
        """Answers that ended by themselves."""
        return self._count([record.finish_reason == "stop" for record in self.records])

    def to_json(self) -> dict[str, Any]:
        counts = {"right": self.right, "verbatim": self.verbatim, "stopped": self.stopped}
        return {
            **{name: asdict(count) for name, count in counts.items()},
            "records": [asdict(record) for record in self.records],
        }

    def _count(self, outcomes: Sequence[bool]) -> Count:
        return Count(sum(outcomes), len(outcomes))


def read_evaluation_rows(source: str | Path) -> list[EvaluationRow]:
    """Read a data file of rows with instruction, output and, if they are there, input and keywords.

    Raises: DataError naming the first row that is wrong.
    """
    rows = []
    for row in read_rows(source):
        if isinstance(row, BlankLine):
            continue
        if isinstance(row, RowFault):
            raise DataError(f"{row.where}: {row.reason}{row.detail and f' ({row.detail})'}")
        fields = row.fields
        question, reference = fields.get("instruction"), fields.get("output")
        keywords = fields.get("keywords") or []
        if not (isinstance(question, str) and question.strip() and isinstance(reference, str)):
            raise DataError(
                f'{row.where}: an evaluation row needs "instruction" and "output" as text '
                f"(keys found: {', '.join(map(str, fields))})."
            )
        if not (isinstance(keywords, list) and all(isinstance(word, str) and word for word in keywords)):
            raise DataError(f'{row.where}: "keywords" is {keywords!r}; it must be a list of texts.')
        rows.append(EvaluationRow(question, reference, tuple(keywords), str(fields.get("input") or "")))
    return rows


def evaluate_answers(
    chat: Chat,
    rows: Sequence[EvaluationRow],
    *,
    sampling: SamplingSettings = GREEDY,
    progress: Callable[[int, int], None] | None = None,
) -> AnswersReport:
    """Ask every question and judge every answer; ``progress`` gets (answers done, answers asked for)."""
    questions = [[Message("user", row.question, row.input)] for row in rows]
    done: list[int] = []

    def note(place: int, answer: Answer) -> None:
        done.append(place)
        if progress is not None:
            progress(len(done), len(questions))

    answers = chat.ask_many(questions, sampling=sampling, on_answer=note)
    return AnswersReport(
        tuple(
            judge_answer(row, answer.text, answer.finish_reason)
            for row, answer in zip(rows, answers, strict=True)
        )
    )


def judge_answer(row: EvaluationRow, answer: str, finish_reason: FinishReason) -> AnswerRecord:
    """Return the record of one answer to ``row``."""
    is_right = has_keywords(row.keywords, answer) if row.keywords else states_facts(row.reference, answer)
    return AnswerRecord(
        row.question, row.reference, answer, is_right, is_verbatim(row.reference, answer), finish_reason
    )
