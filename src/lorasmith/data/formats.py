"""Row formats -> messages: one function for each format, and the choice among them.

    alpaca             {"instruction": "...", "input": "...", "output": "..."}        input may be missing
    prompt_completion  {"prompt": "...", "completion": "..."}                         or two lists of messages
    messages           {"messages": [{"role": "user", "content": "..."}, ...]}
    sharegpt           {"conversations": [{"from": "human", "value": "..."}, ...]}

A pair of answers to one question (kind "pairs"):

    preference         {"prompt": "...", "chosen": "...", "rejected": "..."}          or messages in any of the three;
                       the question also as instruction (input), messages or conversations, or inside chosen

An answer that is judged good or bad alone (kind "labelled"); pairs are read as one of each:

    labelled           any row with an answer, and "label": true or false

A whole text (kind "documents"):

    text               {"text": "..."}

Extra keys are ignored. A row that cannot be used raises :class:`RowProblem`, which says whether it is
skipped (nothing to learn from) or an error (somebody has to look).
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lorasmith.data.example import Example, Message, Role
from lorasmith.data.settings import RowKind

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_CONTROL_OF_TEXT = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")  # old texts have form feeds
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}

_MOST_LETTERS = 500  # of the keys of a row that are shown


class RowProblem(Exception):  # noqa: N818  (not an error for the caller: one row's fate)
    """A row that is not used. ``reason`` is one of few words, to be counted; ``detail`` says more."""

    def __init__(self, reason: str, detail: str = "", *, is_error: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail
        self.is_error = is_error


@dataclass(frozen=True, slots=True)
class Format:
    """``keys`` are those that a row of this format must have; ``title`` is its name in a sentence."""

    name: str
    title: str
    keys: tuple[str, ...]
    to_messages: Callable[[Mapping[str, Any]], tuple[Message, ...]]
    kind: RowKind = "answers"

    def fits(self, fields: Mapping[str, Any]) -> bool:
        """Whether a row has all of its keys."""
        return all(key in fields for key in self.keys)

    def teaches(self, kind: RowKind) -> bool:
        """Whether its rows can be read as ``kind``: their own, and of pairs one good and one bad answer."""
        return self.kind == kind or (self.kind == "pairs" and kind == "labelled")

    def examples(self, fields: Mapping[str, Any], where: str) -> tuple[Example, ...]:
        """Return what a row teaches: one example, or the chosen and the rejected one of a pair.

        Raises:
            RowProblem: the row has nothing to learn, or is of another format.
        """
        messages = self.read(fields)
        if self.kind == "labelled":
            return (Example(messages, where, is_rejected=not _label(fields)),)
        if self.kind != "pairs":
            return (Example(messages, where),)
        rejected = _checked(_side(fields, "rejected"))
        if rejected[:-1] != messages[:-1]:
            raise RowProblem(
                "two questions", "chosen and rejected do not answer the same conversation", is_error=True
            )
        if rejected == messages:
            raise RowProblem("chosen and rejected are the same")
        return Example(messages, where), Example(rejected, where, is_rejected=True)

    def read(self, fields: Mapping[str, Any]) -> tuple[Message, ...]:
        """Return the conversation of a row; of a pair, the chosen one; of a text, one message.

        Raises:
            RowProblem: the row has nothing to learn, or is of another format.
        """
        if not self.fits(fields):
            other = detect_format(fields)
            if other or not any(key in fields for key in self.keys):
                what = f"a row of {other.title}" if other else describe_keys(fields)
                raise RowProblem(
                    "another schema",
                    f"{what}, in a file of {self.title} ({' and '.join(self.keys)})",
                    is_error=True,
                )
        messages = self.to_messages(fields)
        return messages if self.kind == "documents" else _checked(messages)


def _checked(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if not messages or messages[-1].role != "assistant":
        raise RowProblem("missing answer", "the last turn is not the assistant's")
    if all(message.role != "user" for message in messages):
        raise RowProblem("missing instruction", "no turn is the user's")
    return messages


def _alpaca(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    instruction = _text(fields, "instruction", "instruction")
    context = "" if _is_blank(fields.get("input")) else _text(fields, "input", "input")
    answer = _text(fields, "output", "answer")
    return Message("user", instruction, context), Message("assistant", answer)


def _prompt_completion(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    if isinstance(fields.get("prompt"), list) and isinstance(fields.get("completion"), list):
        return _turns([*fields["prompt"], *fields["completion"]], "role", "content")
    prompt, completion = _text(fields, "prompt", "instruction"), _text(fields, "completion", "answer")
    return Message("user", prompt), Message("assistant", completion)


def _messages(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    return _turns(fields["messages"], "role", "content")


def _sharegpt(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    return _turns(fields["conversations"], "from", "value")


def _document(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    return (Message("document", _text(fields, "text", "text", _CONTROL_OF_TEXT)),)


def _labelled(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    inner = next((f for f in _formats_of("answers") if f.fits(fields)), None)
    if inner is None:
        raise RowProblem("another schema", f"a label, and no answer: {describe_keys(fields)}", is_error=True)
    return inner.to_messages(fields)


def _label(fields: Mapping[str, Any]) -> bool:
    """Return whether the answer is a good one; CSV has words and numbers for it."""
    label = fields["label"]
    if isinstance(label, str):
        label = {"true": True, "1": True, "false": False, "0": False}.get(label.strip().lower(), label)
    if label not in (True, False):  # 1 and 0 too
        raise RowProblem("label is not true or false", f'"label" is {str(label)[:40]!r}', is_error=True)
    return bool(label)


def _side(fields: Mapping[str, Any], key: str) -> tuple[Message, ...]:
    """Return the conversation that ends with the answer at ``key``, "chosen" or "rejected"."""
    answer = fields[key]
    if isinstance(answer, Mapping):
        answer = [answer]
    if not isinstance(answer, list):
        return (*_question(fields), Message("assistant", _text(fields, key, f"{key} answer")))
    turns = _turns(answer, "role", "content")
    is_whole = bool(turns) and turns[0].role != "assistant"
    return turns if is_whole else (*_question(fields), *turns)


def _question(fields: Mapping[str, Any]) -> tuple[Message, ...]:
    for key in ("prompt", "messages", "conversations"):
        if isinstance(fields.get(key), list):
            return _turns(fields[key], "role", "content")
    if "prompt" in fields or "instruction" not in fields:
        return (Message("user", _text(fields, "prompt", "instruction")),)
    context = "" if _is_blank(fields.get("input")) else _text(fields, "input", "input")
    return (Message("user", _text(fields, "instruction", "instruction"), context),)


FORMATS = {
    f.name: f
    for f in (  # the order is the precedence where a row has the keys of several
        Format(
            "preference", "preference rows", ("chosen", "rejected"), lambda f: _side(f, "chosen"), "pairs"
        ),
        Format("messages", "OpenAI messages", ("messages",), _messages),
        Format("sharegpt", "ShareGPT conversations", ("conversations",), _sharegpt),
        Format("alpaca", "Alpaca rows", ("instruction", "output"), _alpaca),
        Format("prompt_completion", "prompt/completion rows", ("prompt", "completion"), _prompt_completion),
        Format("labelled", "labelled rows", ("label",), _labelled, "labelled"),
        Format("text", "plain texts", ("text",), _document, "documents"),
    )
}


def detect_format(fields: Mapping[str, Any], kind: RowKind = "answers") -> Format | None:
    """Return the format of ``kind`` all of whose keys the row has.

    Neither a pair of answers nor a labelled one, which may be a bad one, is an answer to learn; and a row with an
    answer is never a plain text.
    """
    if kind == "documents" and (detect_format(fields) or _is_pair(fields) or _is_labelled(fields)):
        return None
    if kind == "answers" and (_is_pair(fields) or _is_labelled(fields)):
        return None
    return next((f for f in _formats_of(kind) if f.fits(fields)), None)


def _is_pair(fields: Mapping[str, Any]) -> bool:
    return "chosen" in fields and "rejected" in fields


def _is_labelled(fields: Mapping[str, Any]) -> bool:
    """Whether the row is an answer with a truth value; a label of another type is an extra key like any other."""
    label = fields.get("label")
    is_truth = isinstance(label, bool) or (
        isinstance(label, str) and label.strip().lower() in ("true", "false")
    )
    return is_truth and any(f.fits(fields) for f in _formats_of("answers"))


def explain_unknown(fields: Mapping[str, Any], kind: RowKind = "answers") -> str:
    """Say why a row is of no known format of ``kind``, and which is nearest."""
    if kind == "answers" and _is_pair(fields):
        return (
            "These are preference rows (chosen, rejected). Training on answers needs rows with one answer; "
            "objective.name=dpo learns from pairs, and lorasmith check --pairs looks at them."
        )
    if kind in ("answers", "pairs") and _is_labelled(fields):
        return (
            "These are labelled rows (label: true or false). objective.name=kto learns from them, and lorasmith check "
            "--labels looks at them. "
            + (
                "Training on answers would learn the bad ones as well: leave those out, and the label."
                if kind == "answers"
                else "This objective needs preference rows (prompt, chosen, rejected)."
            )
        )
    if kind == "labelled" and detect_format(fields):
        return (
            f"{describe_keys(fields)}: a row with an answer and no label. objective.name=kto needs labelled rows "
            "(label: true or false) or preference rows (chosen, rejected); objective.name=sft trains on answers."
        )
    if kind == "pairs" and detect_format(fields):
        return (
            f"{describe_keys(fields)}: a row with one answer. This objective needs preference rows (prompt, chosen, "
            "rejected); objective.name=sft trains on answers."
        )
    labelled = FORMATS["labelled"] if _is_labelled(fields) else None
    if kind == "documents" and (other := detect_format(fields) or detect_format(fields, "pairs") or labelled):
        objective = {"pairs": "dpo", "labelled": "kto"}.get(other.kind, "sft")
        takes_text = " If its text is to be learnt: data.format=text." if "text" in fields else ""
        return (
            f"{describe_keys(fields)}: a row of {other.title}. objective.name=text learns plain texts (text) from the "
            f"first to the last token; objective.name={objective} learns answers."
            f"{takes_text}"
        )
    if kind != "documents" and detect_format(fields, "documents"):
        return (
            f"{describe_keys(fields)}: a plain text, without question and answer. objective.name=text learns it from "
            "the first to the last token; lorasmith check --text looks at it."
        )

    def likeness(f: Format) -> float:
        return sum(
            max((difflib.SequenceMatcher(None, key, k).ratio() for k in fields), default=0) for key in f.keys
        )

    nearest = max(_formats_of(kind), key=lambda f: likeness(f) / len(f.keys))
    known = "; ".join(f"{f.title}: {', '.join(f.keys)}" for f in _formats_of(kind))
    keys = ", ".join(nearest.keys)
    return (
        f"{describe_keys(fields)}. The nearest format is {nearest.title} ({keys}). Known: {known}. Rename the keys; "
        "--format names a format that should be assumed."
    )


def _formats_of(kind: RowKind) -> list[Format]:
    return [f for f in FORMATS.values() if f.teaches(kind)]


def describe_keys(fields: Mapping[str, Any]) -> str:
    """Return the keys of a row for an error text: "keys found: id, text"."""
    found = ", ".join(map(str, fields)) or "none"
    return f"keys found: {found if len(found) <= _MOST_LETTERS else found[:_MOST_LETTERS] + ' ...'}"


def _turns(turns: Any, role_key: str, content_key: str) -> tuple[Message, ...]:
    if not isinstance(turns, Iterable) or isinstance(turns, str | bytes | Mapping):
        raise RowProblem(
            "another schema", f"the turns are a {type(turns).__name__}, not a list", is_error=True
        )
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise RowProblem("another schema", f"turn {number} is not an object", is_error=True)
        # Both spellings are in use under either key.
        role_name = turn.get(role_key, turn.get("role", turn.get("from")))
        key = content_key if content_key in turn else ("content" if "content" in turn else "value")
        role = _ROLES.get(role_name) if isinstance(role_name, str) else None
        if role is None:
            raise RowProblem(
                "unknown role",
                f"turn {number} is of {role_name!r}; known: {', '.join(_ROLES)}",
                is_error=True,
            )
        if role == "system" and _is_blank(turn.get(key)):
            continue
        what = {"assistant": "answer", "user": "instruction", "system": "system prompt"}[role]
        messages.append(
            Message(role, _text({key: _joined_parts(turn.get(key))} if key in turn else {}, key, what))
        )
    return tuple(messages)


def _joined_parts(content: Any) -> Any:
    """Return the text of OpenAI's content parts, [{"type": "text", "text": ...}, ...]; else the content itself."""
    if (
        isinstance(content, list)
        and content
        and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content)
    ):
        texts = [part.get("text") for part in content]
        return "".join(texts) if all(isinstance(text, str) for text in texts) else content
    return content


def _is_blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _text(fields: Mapping[str, Any], key: str, what: str, forbidden: re.Pattern[str] = _CONTROL) -> str:
    """Return a field that must be text with something in it.

    Raises:
        RowProblem: to be skipped, but an error where the text has control characters.
    """
    value = fields.get(key)
    if value is None:
        raise RowProblem(
            f"{'null' if key in fields else 'missing'} {what}", f'"{key}", {describe_keys(fields)}'
        )
    if not isinstance(value, str):
        raise RowProblem(f"{what} is not text", f'"{key}" is a {type(value).__name__}')
    if not value.strip():
        raise RowProblem(f"empty {what}", f'"{key}"')
    if control := forbidden.search(value):
        raise RowProblem("control character", f'U+{ord(control.group()):04X} in "{key}"', is_error=True)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RowProblem("lone surrogate", f'half a character in "{key}"') from None
    return value
