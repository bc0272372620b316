"""Tokens -> text, piece by piece, never showing half a character or a part of a stop string."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

FinishReason = Literal["stop", "length"]

REPLACEMENT = "\ufffd"  # what a tokenizer decodes an unfinished character to


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer while it is written; the texts of all pieces together are the answer's text.

    ``token_ids`` are the ids that this text stands for, the end token among them. Only the last piece has a
    ``finish_reason``; its text may be empty. ``tokens_per_second`` counts from the moment of asking.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. ``finish_reason`` is "stop" when it ended by itself, "length" when it was cut."""

    text: str
    token_ids: tuple[int, ...]  # the end token included
    prompt_tokens: int
    finish_reason: FinishReason
    seconds: float

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids)


class TextDecoder:
    """Turns token ids into text that is final: what has been given out never changes.

    A character may be spread over several byte-level tokens, and a SentencePiece token's leading space
    depends on the token before it. So the newest tokens are decoded together with those just before them,
    and kept back while the end of the text is an unfinished character:

        settled ids   [..., "Sai", "gon"]   +   [0xC3]         -> nothing yet
                                            +   [0xC3, 0xA9]   -> "é"
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context_at = 0  # ids before this are no longer needed to decode the next ones
        self._settled_at = 0  # ids before this have been given out

    def push(self, token_id: int) -> str:
        """Return the text that became final with this token."""
        self._ids.append(token_id)
        text = self._unsettled()
        if text.endswith(REPLACEMENT):
            return ""
        self._context_at, self._settled_at = self._settled_at, len(self._ids)
        return text

    def flush(self) -> str:
        """Return what is left at the end of the answer, without an unfinished last character."""
        text = self._unsettled().rstrip(REPLACEMENT)
        self._context_at = self._settled_at = len(self._ids)
        return text

    def _unsettled(self) -> str:
        known = self._decode(self._ids[self._context_at : self._settled_at])
        return self._decode(self._ids[self._context_at :])[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class StopGuard:
    """Lets text through up to the first stop string, whose characters may arrive in several pieces."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Return the text that surely belongs to the answer; sets ``found`` at a stop string."""
        text = self._held + text
        places = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """Return what was held back: the beginning of a stop string that never came."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that begins ``stop`` without completing it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class AnswerWriter:
    """Writes one answer from its tokens and knows when it is finished. Every way of decoding ends in one."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_token_ids: Collection[int],
        hidden_token_ids: Collection[int],
        stop: Sequence[str],
        max_tokens: int,
        lead: str = "",
    ) -> None:
        """Begin an answer; ``lead`` is white space of the template that the model writes before its words."""
        self._lead = lead
        self._decoder = TextDecoder(tokenizer)
        self._guard = StopGuard(stop)
        self._stop_token_ids = stop_token_ids
        self._hidden_token_ids = hidden_token_ids
        self.max_tokens = max_tokens
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None

    def write(self, token_id: int) -> str:
        """Add a token; return the text that became final. Special tokens have none."""
        assert self.finish_reason is None, "the answer is already finished"
        self.token_ids.append(token_id)
        text = self._settle(token_id)
        if text:
            text, self._lead = text.removeprefix(self._lead), ""
        self.text += text
        return text

    def _settle(self, token_id: int) -> str:
        text = ""
        if token_id in self._stop_token_ids:
            self.finish_reason = "stop"
        elif token_id not in self._hidden_token_ids:
            text = self._guard.push(self._decoder.push(token_id))
        if self._guard.found:
            self.finish_reason = "stop"
        elif self.finish_reason is None and len(self.token_ids) >= self.max_tokens:
            self.finish_reason = "length"
        if self.finish_reason is None or self._guard.found:
            return text
        text += self._guard.push(self._decoder.flush())
        if self._guard.found:  # the last characters completed a stop string
            self.finish_reason = "stop"
            return text
        return text + self._guard.flush()
