"""What held-out rows and answers have in common with the training data: leakage and copying."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lorasmith.data.example import Example, Message
from lorasmith.evaluation.questions import EvaluationRow

RUN_WORDS = 8  # words in a row that count as copied: shorter ones are turns of phrase
QUESTION_WORDS = 4  # a shorter question stands in a plain text by chance

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Copying:
    """How much of one answer stands in training answers.

    ``share`` of its words lie in runs of 8 or more that a training answer has too; ``whole_of`` is the file:line of
    a training answer that it repeats from beginning to end.
    """

    share: float
    whole_of: str | None


def find_leaks(rows: Sequence[EvaluationRow], training: Iterable[Example]) -> dict[int, str]:
    """Return where each held-out row that was trained on stands in the training data, by the row's number.

    The same question is the same words in the same order; capitals, punctuation and white space do not matter. In a
    plain text its last turn is looked for, if it has four words or more.
    """
    if not rows:  # the training data may be large
        return {}
    keys = [_question_key(row.asked) for row in rows]
    wanted = set(keys)
    in_texts = {
        key: _in_line(words)
        for key, row in zip(keys, rows, strict=True)
        if len(words := _words(f"{row.asked[-1].content} {row.asked[-1].input}")) >= QUESTION_WORDS
    }
    found: dict[str, str] = {}
    for example in training:
        if example.is_text:
            text = _in_line(_words(example.answer))
            stand_here = [key for key, words in in_texts.items() if words in text]
        else:
            stand_here = [key] if (key := _question_key(example.question)) in wanted else []
        for key in stand_here:
            found.setdefault(key, example.where)
    return {number: found[key] for number, key in enumerate(keys) if key in found}


def measure_copying(answers: Sequence[str], training: Iterable[Example]) -> list[Copying]:
    """Return for each answer how much of it stands in the training answers, or texts. One pass over them."""
    words = [_words(answer) for answer in answers]
    wanted = {run for answer in words for run in _runs(answer)}
    wholes: dict[tuple[str, ...], str] = {}
    whole_answers = set(words)
    seen: set[tuple[str, ...]] = set()
    for example in training:
        trained = _words(example.answer)
        if trained in whole_answers:
            wholes.setdefault(trained, example.where)
        seen.update(run for run in _runs(trained) if run in wanted)
    return [Copying(_covered(answer, seen), wholes.get(answer) if answer else None) for answer in words]


def _covered(words: tuple[str, ...], seen: set[tuple[str, ...]]) -> float:
    inside = [False] * len(words)
    for start, run in enumerate(_runs(words)):
        if run in seen:
            inside[start : start + RUN_WORDS] = [True] * RUN_WORDS
    return sum(inside) / max(1, len(words))


def _runs(words: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [words[start : start + RUN_WORDS] for start in range(len(words) - RUN_WORDS + 1)]


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))


def _in_line(words: tuple[str, ...]) -> str:
    return f" {' '.join(words)} "  # so that no word is found within another


def _question_key(messages: Sequence[Message]) -> str:
    turns = [(m.role, *_words(m.content), *_words(m.input)) for m in messages if m.role != "system"]
    return "\n".join(" ".join(turn) for turn in turns)
