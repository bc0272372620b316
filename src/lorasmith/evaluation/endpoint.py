"""Ask an OpenAI-compatible endpoint: a served run, an exported model in another program, or any other model.

    POST <url>/chat/completions {"model": ..., "messages": [...], "temperature": 0, "max_tokens": ...}

The questions are sent as messages, so the server's own chat template is what is evaluated.
"""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lorasmith.data.example import Message
from lorasmith.errors import EndpointError
from lorasmith.evaluation.store import KeptAnswer
from lorasmith.generation.sampling import SamplingSettings

KEY_VARIABLE = "OPENAI_API_KEY"
_AT_ONCE = 4  # requests under way; a server that batches is kept busy, one that does not is not flooded
_SHOWN = 300  # characters of an unexpected reply that an error quotes


class Endpoint:
    """A model behind a URL. The key of the environment's OPENAI_API_KEY, if set, goes along."""

    def __init__(self, url: str, *, model: str | None = None, timeout_seconds: float = 300) -> None:
        """Find the endpoint; without ``model``, its first one is asked.

        Raises:
            EndpointError: it cannot be reached, or lists no model.
        """
        self._url = url.rstrip("/").removesuffix("/chat/completions")
        if not self._url.startswith(("http://", "https://")):
            raise EndpointError(f"{url} is no URL of an endpoint; one reads http://127.0.0.1:8000/v1")
        self._timeout = timeout_seconds
        self.model = model or self._first_model()
        self.name = f"{self.model} at {self._url}"

    def ask_many(
        self,
        questions: Sequence[Sequence[Message]],
        *,
        sampling: SamplingSettings,
        on_answer: Callable[[int, KeptAnswer], None] = lambda place, answer: None,
    ) -> list[KeptAnswer]:
        """Answer every question, a few at a time; the answers are in the order asked.

        Raises:
            EndpointError: a request fails, or its reply is no chat completion.
        """

        def ask(question: Sequence[Message]) -> KeptAnswer:
            return self._ask(question, sampling)

        answers = []
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            try:
                for place, answer in enumerate(pool.map(ask, questions)):
                    answers.append(answer)
                    on_answer(place, answer)
            except EndpointError:
                pool.shutdown(cancel_futures=True)  # the others would fail the same way
                raise
        return answers

    def _ask(self, question: Sequence[Message], sampling: SamplingSettings) -> KeptAnswer:
        body = {
            "model": self.model,
            "messages": [{"role": turn.role, "content": _content(turn)} for turn in question],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            **({"stop": list(sampling.stop)} if sampling.stop else {}),
            **({"seed": sampling.seed} if sampling.seed is not None else {}),
        }
        reply = self._send("/chat/completions", body)
        try:
            choice = reply["choices"][0]
            text, reason = choice["message"]["content"] or "", choice["finish_reason"]
            num_tokens = int((reply.get("usage") or {}).get("completion_tokens") or 0)
        except (KeyError, IndexError, TypeError, ValueError):
            raise EndpointError(
                f"{self._url} does not answer as OpenAI's chat completions do: {json.dumps(reply)[:_SHOWN]}"
            ) from None
        return KeptAnswer(text, num_tokens, "length" if reason == "length" else "stop")

    def _first_model(self) -> str:
        listed = self._send("/models").get("data")
        names = (
            [str(m["id"]) for m in listed if isinstance(m, dict) and "id" in m]
            if isinstance(listed, list)
            else []
        )
        if not names:
            raise EndpointError(
                f"{self._url}/models lists no model. Name the one to ask: --endpoint-model NAME"
            )
        return names[0]

    def _send(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                reply = json.load(response)
        except urllib.error.HTTPError as fault:
            said = fault.read(_SHOWN).decode(errors="replace")
            hint = f" It wants a key: set {KEY_VARIABLE}." if fault.code in (401, 403) else ""
            raise EndpointError(f"{self._url}{path} refused with {fault.code}: {said}{hint}") from fault
        except (OSError, ValueError) as fault:
            reason = getattr(fault, "reason", fault)
            raise EndpointError(
                f"{self._url}{path} cannot be asked: {reason}. Is the server running, and is this its address?"
            ) from fault
        if not isinstance(reply, dict):
            raise EndpointError(f"{self._url}{path} gave no JSON object: {str(reply)[:_SHOWN]}")
        return reply


def _content(turn: Message) -> str:
    """An endpoint has no place of its own for an Alpaca row's input: it stands below the instruction."""
    return f"{turn.content}\n\n{turn.input}" if turn.input else turn.content
