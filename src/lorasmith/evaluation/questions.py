"""Questions whose answers are known: read from a data file of any format, with keywords if its rows have them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from lorasmith.data.example import Example, Message
from lorasmith.data.formats import RowProblem, detect_format, explain_unknown
from lorasmith.data.settings import RowKind
from lorasmith.data.sources import BlankLine, Row, RowFault, read_rows
from lorasmith.errors import DataError
from lorasmith.evaluation.facts import Keyword

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """A question with its reference answer, and the keywords of a right answer if somebody chose them.

    ``asked`` is the conversation up to and with the question, ``where`` its place: file:line.
    """

    asked: tuple[Message, ...]
    reference: str
    keywords: tuple[Keyword, ...] = ()
    where: str = ""

    @property
    def question(self) -> str:
        """The last question as a reader is shown it, with its input."""
        last = self.asked[-1]
        return f"{last.content}\n{last.input}" if last.input else last.content

    def as_example(self) -> Example:
        """Return the row as training would see it."""
        return Example((*self.asked, Message("assistant", self.reference)), self.where)


def ask(question: str, reference: str, *keywords: Keyword) -> EvaluationRow:
    """Return the row of a plain question."""
    return EvaluationRow((Message("user", question),), reference, keywords)


def read_evaluation_rows(
    source: str | Path, kind: RowKind = "answers", *, skips_faults: bool = False
) -> list[EvaluationRow]:
    """Read a data file of any training format; a row may have ``keywords`` beside its keys.

    The reference of a pair is the chosen answer; an answer that is labelled false is no reference and left out. A
    keyword is a text, or a list of texts any of which will do: ["payday", ["4", "four"]]. ``kind`` is what the rows of
    the run are that is judged: where they are labelled, a label of 1 or 0 is one here too. ``skips_faults`` leaves out
    what has no question with an answer, as training does with rows of its validation file.

    Raises:
        DataError: a row is wrong (the first is named), or there is no row.
    """
    kinds: tuple[RowKind, RowKind] = (
        ("labelled", "answers") if kind == "labelled" else ("answers", "labelled")
    )
    rows = []
    for row in read_rows(source):
        if isinstance(row, BlankLine):
            continue
        try:
            example = _read_example(row, kinds)
        except DataError:
            if skips_faults:
                continue
            raise
        assert isinstance(row, Row), "a faulty row has no example"
        keywords = _read_keywords(row.fields.get("keywords"), row.where)
        if not example.is_rejected:
            rows.append(EvaluationRow(example.question, example.answer, keywords, row.where))
    if not rows:
        raise DataError(f"{source} holds no question to ask.")
    return rows


def _read_example(row: Row | RowFault, kinds: Iterable[RowKind]) -> Example:
    if isinstance(row, RowFault):
        raise DataError(f"{row.where}: {row.reason}{row.detail and f' ({row.detail})'}")
    found = next(filter(None, (detect_format(row.fields, kind) for kind in kinds)), None)
    if found is None:
        raise DataError(f"{row.where}: no question with a reference answer. {explain_unknown(row.fields)}")
    try:
        example, *_ = found.examples(row.fields, row.where)
    except RowProblem as problem:
        raise DataError(f"{row.where}: {problem.reason} ({problem.detail})") from None
    if not example.question or example.question[-1].role != "user":
        raise DataError(f"{row.where}: the turn before the last answer is not the user's.")
    return example


def spread_evenly(rows: Sequence[T], most: int) -> list[T]:
    """Return at most ``most`` of ``rows``, from all over them, in their order; the same ones every time."""
    if len(rows) <= most:
        return list(rows)
    return [rows[i * len(rows) // most] for i in range(most)]


def name_keywords(keywords: Iterable[Keyword]) -> list[str]:
    """Return keywords as a reader is shown them."""
    return [word if isinstance(word, str) else " or ".join(word) for word in keywords]


def _read_keywords(value: object, where: str) -> tuple[Keyword, ...]:
    def is_text(word: object) -> bool:
        return isinstance(word, str) and bool(word)

    if value in (None, ""):  # a CSV or Parquet column that is empty here
        return ()
    if not isinstance(value, list) or not all(
        is_text(word) or (isinstance(word, list) and word and all(map(is_text, word))) for word in value
    ):
        raise DataError(
            f'{where}: "keywords" is {value!r}; it must be a list of texts, or of lists of texts any of '
            "which will do."
        )
    return tuple(tuple(word) if isinstance(word, list) else word for word in value)
