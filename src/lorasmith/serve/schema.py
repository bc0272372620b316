"""OpenAI's requests and replies as values. What a client says here and we cannot do is refused by name."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lorasmith.data.example import Message
from lorasmith.generation.sampling import SamplingError, SamplingSettings, parse_sampling
from lorasmith.serve.batch import Token
from lorasmith.serve.faults import RequestError
from lorasmith.serve.models import ServedModel

MAX_STOPS = 16  # each is looked for after every token

# Not done here; the value that says so changes nothing and is let through.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (0, -1),
    "web_search_options": (),
}
# Notes of a client to its provider; they change no answer anywhere.
_NOTES = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "user",
    "verbosity",
}


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, said: Any) -> Any:
        """Take null for what is not said: clients send an answer back with all that it could have held."""
        return (
            {k: value for k, value in said.items() if value is not None} if isinstance(said, dict) else said
        )


class TextPart(_Value):
    type: Literal["text"]
    text: str


class ChatMessage(_Value):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | tuple[TextPart, ...] = ""
    name: str | None = None
    """Which of several people speaks. LangChain sends it; no recipe has a place for it, so it changes nothing."""
    refusal: None = None
    tool_calls: tuple[()] | None = None

    def to_message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class JsonSchema(_Value):
    name: str = Field(min_length=1)
    schema_: dict[str, Any] = Field(default={}, alias="schema")
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(_Value):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def schema_of_answer(self) -> Mapping[str, Any] | None:
        """Return the JSON schema that the answer must follow; None: any text."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return {"type": "object"}
        if self.json_schema is None:
            raise RequestError("response_format has no json_schema.", param="response_format")
        return self.json_schema.schema_


class StreamOptions(_Value):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Request(_Value):
    """What both kinds of completions may say."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    n: int = Field(default=1, ge=1)
    stop: str | tuple[str, ...] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat = ResponseFormat(type="text")
    override_system: bool = False  # ours: replace the system prompt that the run was trained with

    @property
    def num_top(self) -> int | None:
        """How many likeliest tokens are told beside each; None: no log probabilities at all."""
        raise NotImplementedError

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def limit(self) -> tuple[str, int | None]:
        """How many tokens an answer may have, behind the name by which the request says so."""
        return "max_tokens", self.max_tokens

    def sampling(self, *, max_answer_tokens: int) -> SamplingSettings:
        """Return the settings that ``lorasmith ask`` would use; what is not said has its default there."""
        if isinstance(self.stop, tuple) and len(self.stop) > MAX_STOPS:
            raise RequestError(
                f"There are {len(self.stop)} stop strings; this server looks for at most {MAX_STOPS}.",
                param="stop",
            )
        limit_name, limit = self.limit
        try:
            sampling = parse_sampling(
                temperature=self.temperature,
                top_p=self.top_p,
                seed=self.seed,
                stop=self.stop,
                max_tokens=limit,
            )
        except SamplingError as fault:
            name = fault.names[0]
            raise RequestError(str(fault), param=limit_name if name == "max_tokens" else name) from fault
        if sampling.max_tokens > max_answer_tokens:
            if limit is not None:
                raise RequestError(
                    f"{limit_name} is {limit}; this server writes at most {max_answer_tokens}.",
                    param=limit_name,
                )
            sampling = sampling.model_copy(update={"max_tokens": max_answer_tokens})
        return sampling


class ChatRequest(Request):
    """``POST /v1/chat/completions``."""

    messages: tuple[ChatMessage, ...] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    @property
    def num_top(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true.", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def limit(self) -> tuple[str, int | None]:
        given = self.max_completion_tokens
        return super().limit if given is None else ("max_completion_tokens", given)


class CompletionRequest(Request):
    """``POST /v1/completions``. A prompt is a question, and the model's recipe is put around it.

    ``raw`` continues the text as it stands instead: for clients that wrote the template themselves.
    """

    prompt: str | tuple[str, ...] | tuple[int, ...] | tuple[tuple[int, ...], ...]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    raw: bool = False

    @property
    def num_top(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> "tuple[str | tuple[int, ...], ...]":
        """Each prompt, as a text or as token ids."""
        several = self.prompt and not isinstance(self.prompt, str) and not isinstance(self.prompt[0], int)
        return self.prompt if several else (self.prompt,)  # pyright: ignore[reportReturnType]


class LoadAdapterRequest(_Value):
    """``POST /v1/load_lora_adapter``, as vLLM has it."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadAdapterRequest(_Value):
    """``POST /v1/unload_lora_adapter``."""

    lora_name: str
    lora_int_id: int | None = None


R = TypeVar("R", bound=_Value)


def read_request(kind: type[R], values: Any) -> R:
    """Return the request that a JSON body says.

    Raises:
        RequestError: it is none, or wants what this server does not do.
    """
    if not isinstance(values, dict):
        raise RequestError("The request is no JSON object.")
    said = {name: value for name, value in values.items() if value is not None and name not in _NOTES}
    for name in [name for name in said if name in _UNSUPPORTED and name not in kind.model_fields]:
        value = said.pop(name)
        if value not in _UNSUPPORTED[name]:
            raise RequestError(
                f"{name} is not supported by this server. Leave it out.",
                param=name,
                code="unsupported_parameter",
            )
    try:
        return kind.model_validate(said)
    except ValidationError as error:
        # Of the kinds that a value may have, the one that fits furthest.
        fault = max(error.errors(include_url=False), key=lambda fault: len(fault["loc"]))
    place = ".".join(str(part) for part in fault["loc"] if not _is_type_name(part))
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(fault["loc"][-1]), kind.model_fields, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise RequestError(
            f"{place} is unknown to this server.{hint}", param=place, code="unknown_parameter"
        ) from None
    raise RequestError(f"{place}: {fault['msg'].removeprefix('Value error, ')}", param=place) from None


def _is_type_name(part: int | str) -> bool:
    """Pydantic puts the tried member of a union into the place of a fault: ("stop", "str")."""
    return isinstance(part, str) and (part in ("str", "int") or part.startswith("tuple["))


# Replies


def list_models(models: Iterable[ServedModel]) -> dict[str, Any]:
    """Return the body of ``GET /v1/models``."""
    return {"object": "list", "data": [model_card(model) for model in models]}


def model_card(model: ServedModel) -> dict[str, Any]:
    """Return one model as ``GET /v1/models`` lists it, with vLLM's keys beside OpenAI's."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "lorasmith",
        "root": model.root,
        "parent": model.parent,
        "max_model_len": model.chat.max_context,
    }


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """Return a reply's ``usage``, all in tokens; the cached ones are among those of the prompt."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def chat_logprobs(model: ServedModel, tokens: Sequence[Token]) -> dict[str, Any]:
    """Return the log probabilities of an answer's tokens, its end token left out as OpenAI does."""
    return {
        "content": [
            {
                **_weighed(model, token.id, token.logprob),
                "top_logprobs": [_weighed(model, *pair) for pair in token.likeliest],
            }
            for token in _shown(model, tokens)
        ],
        "refusal": None,
    }


def completion_logprobs(model: ServedModel, tokens: Sequence[Token], start: int = 0) -> dict[str, Any]:
    """Return the same for a text completion; ``start`` is where its first token stands in the answer."""
    shown = _shown(model, tokens)
    texts = [_text_of(model, token.id) for token in shown]
    offsets = [start + sum(map(len, texts[:place])) for place in range(len(texts))]
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in shown],
        "top_logprobs": [{_text_of(model, id): value for id, value in token.likeliest} for token in shown],
        "text_offset": offsets,
    }


def _shown(model: ServedModel, tokens: Sequence[Token]) -> list[Token]:
    return [token for token in tokens if token.id not in model.chat.stop_token_ids]


def _weighed(model: ServedModel, token_id: int, logprob: float | None) -> dict[str, Any]:
    text = _text_of(model, token_id)
    is_part = "\ufffd" in text  # of a character: its bytes are not those of the text
    return {"token": text, "logprob": logprob, "bytes": None if is_part else list(text.encode())}


def _text_of(model: ServedModel, token_id: int) -> str:
    text = model.chat.tokenizer.decode([token_id], skip_special_tokens=False)
    assert isinstance(text, str)
    return text
