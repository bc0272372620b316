"""Ask questions whose answers are known, judge every answer, and count."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from lorasmith.data.example import Message
from lorasmith.evaluation.facts import agrees_with, has_keywords, is_verbatim
from lorasmith.evaluation.likeness import chrf, rouge_l
from lorasmith.evaluation.questions import EvaluationRow
from lorasmith.evaluation.settings import ReportSettings
from lorasmith.evaluation.statistics import Comparison, Count
from lorasmith.generation.chat import GREEDY
from lorasmith.generation.sampling import SamplingSettings
from lorasmith.generation.stream import FinishReason

MIN_AUTO_TOKENS, MAX_AUTO_TOKENS = 32, 512

Judge = Literal["keywords", "exact match", "likeness"]


class GivenAnswer(Protocol):
    """What is looked at of an answer, whoever gave it."""

    @property
    def text(self) -> str: ...
    @property
    def completion_tokens(self) -> int: ...
    @property
    def finish_reason(self) -> FinishReason: ...


class Asked(Protocol):
    """Who can be asked: a Chat, or an endpoint elsewhere."""

    def ask_many(
        self,
        questions: Sequence[Sequence[Message]],
        *,
        sampling: SamplingSettings,
        on_answer: Callable[[int, Any], None],
    ) -> Sequence[GivenAnswer]: ...


@dataclass(frozen=True, slots=True)
class AnswerRecord:
    """One question as it was answered. ``judged_by`` says what made it right or wrong."""

    question: str
    reference: str
    answer: str
    is_right: bool
    judged_by: Judge
    is_verbatim: bool  # the reference word for word
    rouge_l: float  # 0 to 1
    chrf: float  # 0 to 100
    finish_reason: FinishReason
    num_tokens: int


@dataclass(frozen=True, slots=True)
class AnswersReport:
    """What became of every question, in the order asked."""

    records: tuple[AnswerRecord, ...]

    @property
    def right(self) -> Count:
        return self._count([record.is_right for record in self.records])

    @property
    def with_keywords(self) -> Count:
        """Right answers among the rows that have keywords."""
        return self._count([r.is_right for r in self.records if r.judged_by == "keywords"])

    @property
    def verbatim(self) -> Count:
        """Answers that are the reference word for word."""
        return self._count([record.is_verbatim for record in self.records])

    @property
    def stopped(self) -> Count:
        """Answers that ended by themselves."""
        return self._count([record.finish_reason == "stop" for record in self.records])

    @property
    def mean_rouge_l(self) -> float:
        return sum(record.rouge_l for record in self.records) / max(1, len(self.records))

    @property
    def mean_chrf(self) -> float:
        return sum(record.chrf for record in self.records) / max(1, len(self.records))

    def to_json(self) -> dict[str, Any]:
        counts = {
            "right": self.right,
            "with_keywords": self.with_keywords,
            "verbatim": self.verbatim,
            "stopped": self.stopped,
        }
        return {
            **{name: asdict(count) for name, count in counts.items()},
            "rouge_l": self.mean_rouge_l,
            "chrf": self.mean_chrf,
            "records": [asdict(record) for record in self.records],
        }

    def _count(self, outcomes: Sequence[bool]) -> Count:
        return Count(sum(outcomes), len(outcomes))


def compare_answers(first: AnswersReport, second: AnswersReport) -> Comparison:
    """Count who was right, question by question; both were asked the same in the same order."""
    return Comparison.of(*([record.is_right for record in side.records] for side in (first, second)))


def evaluate_answers(
    chat: Asked,
    rows: Sequence[EvaluationRow],
    *,
    sampling: SamplingSettings = GREEDY,
    settings: ReportSettings | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> AnswersReport:
    """Ask every question and judge every answer; ``progress`` gets (answers done, answers asked for)."""
    done: set[int] = set()

    def note(place: int, answer: GivenAnswer) -> None:
        done.add(place)
        progress(len(done), len(rows))

    answers = chat.ask_many([row.asked for row in rows], sampling=sampling, on_answer=note)
    settings = settings or ReportSettings()
    judged = (judge_answer(row, answer, settings) for row, answer in zip(rows, answers, strict=True))
    return AnswersReport(tuple(judged))


def judge_answer(row: EvaluationRow, answer: GivenAnswer, settings: ReportSettings) -> AnswerRecord:
    """Return the record of one answer to ``row``.

    Keywords decide where somebody chose them. Without any, an answer is right when it is the reference word for
    word; or when it agrees with its facts and is like it, by ROUGE-L or chrF. The last is strict: an answer that
    says the same in other words is counted as wrong.
    """
    exact = is_verbatim(row.reference, answer.text)
    likeness, characters = rouge_l(row.reference, answer.text), chrf(row.reference, answer.text)
    if row.keywords:
        judged_by, is_right = "keywords", has_keywords(row.keywords, answer.text)
    elif exact:
        judged_by, is_right = "exact match", True
    else:
        is_like = likeness >= settings.min_rouge_l or characters >= settings.min_chrf
        judged_by, is_right = "likeness", is_like and agrees_with(row.reference, answer.text)
    return AnswerRecord(
        row.question,
        row.reference,
        answer.text,
        is_right,
        judged_by,
        exact,
        likeness,
        characters,
        answer.finish_reason,
        answer.completion_tokens,
    )


def longest_reference(rows: Sequence[EvaluationRow], tokenizer: Any) -> int:
    """Return the tokens of the longest reference answer; 0 without rows."""
    return max((len(tokenizer(row.reference, add_special_tokens=False).input_ids) for row in rows), default=0)


def choose_max_tokens(rows: Sequence[EvaluationRow], settings: ReportSettings, tokenizer: Any) -> int:
    """Return the longest answer that is waited for, in tokens: as set, or 1.5 times the longest reference."""
    if settings.max_answer_tokens != "auto":
        return settings.max_answer_tokens
    longest = longest_reference(rows, tokenizer)
    return min(MAX_AUTO_TOKENS, max(MIN_AUTO_TOKENS, longest + longest // 2))
