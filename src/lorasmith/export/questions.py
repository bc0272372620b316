"""Questions to prove a merge with: those of the run's own data first, general ones where it is gone."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from lorasmith.data.example import Message
from lorasmith.data.formats import RowProblem, detect_format
from lorasmith.data.sources import Row, read_rows
from lorasmith.errors import DataError
from lorasmith.model.run_record import RunRecord

Question = tuple[Message, ...]
T = TypeVar("T")

_LOOKED_AT = 2_000  # rows; a proof needs a dozen, and a data set may hold a million
_QUESTION_KEYS = ("instruction", "question", "prompt")  # of rows that have no answer

GENERAL = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "How much is 17 plus 25?",
    "List three fruits.",
    "Explain what a database is to a child.",
    "Translate to Spanish: good morning.",
    "Which day comes after Tuesday?",
    "Who are you?",
    "Give me a tip for sleeping better.",
    "Is water wet?",
    "Summarise: The meeting was moved from Monday to Friday because the room was taken.",
    "Write a Python function that adds two numbers.",
    "What is the boiling point of water?",
    "Name a colour and something that has it.",
    "Write a polite refusal of an invitation.",
    "What is the opposite of early?",
    "Give three reasons to learn a language.",
    "Put in order: 7, 3, 5.",
    "What does a baker do?",
    "Rewrite in the past tense: I walk to work.",
)


def read_questions(file: Path) -> list[Question]:
    """Return the questions of a text file (one a line) or of a data file (answers are left out).

    Raises:
        DataError: the file cannot be read or holds none.
    """
    if file.suffix == ".txt":
        try:
            lines = file.read_text("utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as fault:
            raise DataError(f"The questions in {file} cannot be read: {fault}") from fault
        questions = [(Message("user", line.strip()),) for line in lines if line.strip()]
    else:
        questions = list(_questions_of(read_rows(file)))
    if not questions:
        raise DataError(
            f"{file} holds no question. It can be a .txt file with one a line, or a data file as for training."
        )
    return questions


def held_out_questions(record: RunRecord | None, count: int) -> list[Question]:
    """Return ``count`` questions: of the run's validation data, else its training data, then general ones.

    They are spread evenly over the first rows of the data, the same ones every time.
    """
    questions: list[Question] = []
    data = record.settings.get("data", {}) if record else {}
    for source in (data.get("validation"), data.get("train")):
        if source and not questions and Path(source).exists():
            try:
                found = list(itertools.islice(_questions_of(read_rows(source)), _LOOKED_AT))
            except DataError:  # the data has changed since; any question will do
                found = []
            questions = spread_evenly(found, count)
    return (questions + [(Message("user", text),) for text in GENERAL])[:count]


def spread_evenly(questions: Sequence[T], count: int) -> list[T]:
    """Return at most ``count`` of ``questions``, the first and then each at the same distance."""
    return list(questions[:: max(1, len(questions) // count)][:count])


def _questions_of(rows: Iterable[object]) -> Iterator[Question]:
    for row in rows:
        if not isinstance(row, Row):
            continue
        format = detect_format(row.fields) or detect_format(row.fields, "labelled")  # which pairs are too
        try:
            messages = format.read(row.fields)[:-1] if format else ()
        except RowProblem:
            messages = ()
        if messages and messages[-1].role == "user":
            yield messages
        elif not messages:
            text = next(
                (row.fields[key] for key in _QUESTION_KEYS if isinstance(row.fields.get(key), str)), ""
            )
            if text.strip():
                yield (Message("user", text),)
