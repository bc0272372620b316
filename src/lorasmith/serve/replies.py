"""Parts of answers -> OpenAI's replies, whole or chunk by chunk."""

import time
import uuid
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from lorasmith.generation.stream import FinishReason
from lorasmith.serve.batch import Delta, Token
from lorasmith.serve.models import ServedModel
from lorasmith.serve.schema import (
    ChatRequest,
    CompletionRequest,
    Request,
    chat_logprobs,
    completion_logprobs,
    usage,
)
from lorasmith.serve.service import Answering


class Reply(ABC):
    """The reply to one request while its answers are written."""

    asked: Request
    prefix: str
    kind: str  # the reply's "object"
    part_kind: str

    def __init__(self, model: ServedModel) -> None:
        self.model = model
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._texts: defaultdict[int, str] = defaultdict(str)
        self._tokens: defaultdict[int, list[Token]] = defaultdict(list)
        self._reasons: dict[int, FinishReason | None] = {}

    def add(self, index: int, delta: Delta) -> None:
        """Take the next part of an answer."""
        self._texts[index] += delta.text
        self._tokens[index] += delta.tokens
        self._reasons[index] = delta.finish_reason

    def whole(self, answering: Answering) -> dict[str, Any]:
        choices = [self._choice(index) for index in range(len(answering.rows))]
        return {**self._head(self.kind), "choices": choices, "usage": self._usage(answering)}

    def opening(self) -> Iterator[dict[str, Any]]:
        """Yield the chunks that stand before every answer."""
        yield from ()

    def part(self, index: int, delta: Delta) -> dict[str, Any]:
        return self._chunk([self._choice_part(index, delta)])

    def closing(self, answering: Answering) -> dict[str, Any]:
        """Return the last chunk, which says what was used."""
        return {**self._chunk([]), "usage": self._usage(answering)}

    def contents(self) -> dict[str, Any]:
        """Return what was asked and answered, for a log whose owner wants it."""
        return {"asked": self._question(), "answers": list(self._texts.values())}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        unknown = {"usage": None} if self.asked.includes_usage else {}
        return {**self._head(self.part_kind), "choices": choices, **unknown}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self.model.name}

    def _usage(self, answering: Answering) -> dict[str, Any]:
        return usage(answering.prompt_tokens, answering.completion_tokens, answering.cached_tokens)

    @abstractmethod
    def _choice(self, index: int) -> dict[str, Any]: ...

    @abstractmethod
    def _choice_part(self, index: int, delta: Delta) -> dict[str, Any]: ...

    @abstractmethod
    def _question(self) -> Any: ...


class ChatReply(Reply):
    """The reply to ``POST /v1/chat/completions``."""

    prefix, kind, part_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: ServedModel, asked: ChatRequest) -> None:
        super().__init__(model)
        self.asked: ChatRequest = asked

    def opening(self) -> Iterator[dict[str, Any]]:
        for index in range(self.asked.n):
            delta = {"role": "assistant", "content": ""}
            yield self._chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _choice(self, index: int) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": self._texts[index], "refusal": None},
            "logprobs": self._logprobs(self._tokens[index]),
            "finish_reason": self._reasons[index],
        }

    def _choice_part(self, index: int, delta: Delta) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": self._logprobs(list(delta.tokens)),
            "finish_reason": delta.finish_reason,
        }

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        return chat_logprobs(self.model, tokens) if self.asked.logprobs else None

    def _question(self) -> Any:
        return [message.model_dump(exclude_none=True) for message in self.asked.messages]


class CompletionReply(Reply):
    """The reply to ``POST /v1/completions``."""

    prefix, kind, part_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: ServedModel, asked: CompletionRequest) -> None:
        super().__init__(model)
        self.asked: CompletionRequest = asked

    def _choice(self, index: int) -> dict[str, Any]:
        return self._value(index, self._texts[index], self._tokens[index], 0, self._reasons[index])

    def _choice_part(self, index: int, delta: Delta) -> dict[str, Any]:
        start = len(self._texts[index]) - len(delta.text)
        return self._value(index, delta.text, list(delta.tokens), start, delta.finish_reason)

    def _value(
        self, index: int, text: str, tokens: list[Token], start: int, reason: FinishReason | None
    ) -> dict[str, Any]:
        wants = self.asked.logprobs is not None
        return {
            "index": index,
            "text": text,
            "logprobs": completion_logprobs(self.model, tokens, start) if wants else None,
            "finish_reason": reason,
        }

    def _question(self) -> Any:
        return self.asked.prompt
