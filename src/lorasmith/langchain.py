"""A tuned model as LangChain's chat model, asked with the recipe it was trained with.

ChatLorasmith(model="runs/handbook")                                          in this process
ChatLorasmith(model="handbook", base_url="http://127.0.0.1:8000/v1")          through a server

prompt | ChatLorasmith(...) | StrOutputParser()
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

from pydantic import ConfigDict, Field, PrivateAttr, SecretStr

from lorasmith.data.example import Message
from lorasmith.errors import EndpointError, MissingExtraError, RecipeError, SettingsError
from lorasmith.generation.chat import Chat, open_chat
from lorasmith.generation.sampling import SamplingSettings, parse_sampling

try:
    from langchain_core.callbacks import CallbackManagerForLLMRun
    from langchain_core.language_models import BaseChatModel, LanguageModelInput
    from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
    from langchain_core.messages.ai import UsageMetadata
    from langchain_core.output_parsers import JsonOutputParser, PydanticOutputParser
    from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
    from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
    from langchain_core.utils import secret_from_env
    from langchain_core.utils.function_calling import convert_to_json_schema
    from langchain_core.utils.pydantic import is_basemodel_subclass
except ImportError:
    raise MissingExtraError("lorasmith.langchain", "langchain-core", "langchain") from None

_METHODS = ("json_schema", "function_calling", "json_mode")
_ROLES = {"human": "user", "ai": "assistant", "system": "system"}


class ChatLorasmith(BaseChatModel):
    """A run, an adapter, a merged model or a base in this process; with ``base_url`` a model of a server.

    Weights are loaded when they are first asked, once for each model. Asked in this process, questions of a
    ``batch`` take turns; a server answers them together. Tools are not supported.

    Raises, when it is asked: what ``lorasmith.open_chat`` and ``Chat.ask`` raise; EndpointError for a server.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str
    """A folder or a base's name, as for ``lorasmith.open_chat``; with ``base_url`` a name that the server lists."""
    base_url: str | None = None
    """An OpenAI-compatible server, such as ``lorasmith serve``: http://127.0.0.1:8000/v1"""

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop: list[str] | str | None = None
    seed: int | None = None
    override_system: bool = False
    """Let a system message replace the system prompt that the run was trained with."""
    streaming: bool = False
    """Tell callbacks each piece of an answer even where the whole answer was asked for."""

    base: str | None = None
    """In this process: where a run's base model lies now, if it was moved."""
    device: str = "auto"
    dtype: str = "auto"

    api_key: SecretStr | None = Field(default_factory=secret_from_env("LORASMITH_API_KEY", default=None))
    """For a server, as are the next two."""
    timeout: float | None = 300
    max_retries: int = 2

    _chats: dict[str, Chat] = PrivateAttr(default_factory=dict)
    _opening: Any = PrivateAttr(default_factory=threading.Lock)
    _client: Any = PrivateAttr(default=None)

    @property
    def _llm_type(self) -> str:
        return "lorasmith"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        asked = ("model", "base_url", "temperature", "top_p", "max_tokens", "stop", "seed")
        return {name: getattr(self, name) for name in asked}

    @property
    def chat(self) -> Chat:
        """The Chat that answers in this process; its weights are loaded now if they are not yet.

        Raises:
            SettingsError: with ``base_url``.
        """
        if self.base_url is not None:
            raise SettingsError(
                f"{self.model} is a model of {self.base_url}; its weights are not in this process."
            )
        return self._open_chat(self.model)

    def get_token_ids(self, text: str) -> list[int]:
        """Return the ids of a text in the model's own tokens; for a server ``custom_get_token_ids`` must tell them.

        Text splitters count by it: ``length_function=model.get_num_tokens``.
        """
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        if self.base_url is not None:
            raise SettingsError(
                f"{self.base_url} does not tell how it splits text into tokens. Give custom_get_token_ids, "
                "a function from a text to its ids."
            )
        return list(self.chat.tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]

    def with_structured_output(
        self,
        schema: Any,
        *,
        include_raw: bool = False,
        method: str = "json_schema",
        strict: bool | None = None,
    ) -> Runnable[LanguageModelInput, Any]:
        """Hold answers to a JSON schema, a Pydantic class or a TypedDict; needs a server.

        The server lets through only tokens that keep to the schema, and no keys besides those that it names, unless
        it says ``additionalProperties`` itself or ``strict`` is False. The methods "function_calling" and "json_mode"
        are taken for "json_schema", which gives the same values.

        Raises:
            SettingsError: in this process, or for another method.
        """
        if self.base_url is None:
            raise SettingsError(
                "Answers that keep to a schema come from a server only. Start one, lorasmith serve --run RUN, "
                'and ask it: ChatLorasmith(model="RUN", base_url="http://127.0.0.1:8000/v1")'
            )
        if method not in _METHODS:
            raise SettingsError(f"method={method!r}: there are {', '.join(_METHODS)}.")
        json_schema = convert_to_json_schema(schema)
        if strict is not False:
            json_schema = _close(json_schema)
        held = self.bind(
            response_format={
                "type": "json_schema",
                "json_schema": {"name": json_schema.get("title", "answer"), "schema": json_schema},
            },
            ls_structured_output_format={"kwargs": {"method": method, "strict": strict}, "schema": schema},
        )
        is_class = isinstance(schema, type) and is_basemodel_subclass(schema)
        parser: Any = PydanticOutputParser(pydantic_object=schema) if is_class else JsonOutputParser()
        if not include_raw:
            return held | parser
        parsed = RunnablePassthrough.assign(
            parsed=itemgetter("raw") | parser, parsing_error=lambda _: None
        ).with_fallbacks([RunnablePassthrough.assign(parsed=lambda _: None)], exception_key="parsing_error")
        return RunnableMap(raw=held) | parsed

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        whole: Any = None
        for chunk in self._stream(messages, stop, run_manager if self.streaming else None, **kwargs):
            whole = chunk.message if whole is None else whole + chunk.message
        answer = AIMessage(
            content=whole.content,
            response_metadata=whole.response_metadata,
            usage_metadata=whole.usage_metadata,
        )
        return ChatResult(generations=[ChatGeneration(message=answer)])

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        model = kwargs.pop("model", self.model)
        sampling = self._sampling(stop, kwargs)
        turns = [_to_message(message) for message in messages]
        if self.base_url is None:
            _refuse_unknown(kwargs, "answers in this process")
            chunks = self._ask_chat(model, turns, sampling)
        else:
            chunks = self._ask_server(model, turns, sampling, kwargs)
        for message in chunks:
            chunk = ChatGenerationChunk(message=message)
            if run_manager:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            yield chunk

    def _sampling(self, stop: list[str] | None, call: dict[str, Any]) -> SamplingSettings:
        """Return this model's settings with what one call says instead; takes those words out of ``call``."""
        own = {name: getattr(self, name) for name in ("temperature", "top_p", "max_tokens", "seed")}
        own |= {name: call.pop(name) for name in list(call) if name in own}
        return parse_sampling(**own, stop=self.stop if stop is None else stop)

    def _ask_chat(
        self, model: str, turns: Sequence[Message], sampling: SamplingSettings
    ) -> Iterator[AIMessageChunk]:
        chat = self._open_chat(model)
        prompt_tokens = len(chat.encode_prompt(turns, override_system=self.override_system))
        num_tokens = 0
        for piece in chat.stream(turns, sampling=sampling, override_system=self.override_system):
            num_tokens += len(piece.token_ids)
            if piece.finish_reason is None:
                yield AIMessageChunk(content=piece.text)
            else:
                yield _last_chunk(piece.text, model, piece.finish_reason, _count(prompt_tokens, num_tokens))

    def _open_chat(self, model: str) -> Chat:
        with self._opening:
            if model not in self._chats:
                self._chats[model] = open_chat(model, base=self.base, device=self.device, dtype=self.dtype)
        return self._chats[model]

    def _ask_server(
        self, model: str, turns: Sequence[Message], sampling: SamplingSettings, kwargs: dict[str, Any]
    ) -> Iterator[AIMessageChunk]:
        response_format = kwargs.pop("response_format", None)
        _refuse_unknown(kwargs, "asks a server")
        given = {
            "stop": list(sampling.stop) or None,
            "seed": sampling.seed,
            "response_format": response_format,
        }
        reason, usage = "stop", None
        with _explained(self.base_url):
            for chunk in self._open_client().chat.completions.create(
                model=model,
                messages=[{"role": turn.role, "content": turn.content} for turn in turns],
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"override_system": True} if self.override_system else None,
                **{name: value for name, value in given.items() if value is not None},
            ):
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    reason = choice.finish_reason or reason
                    if choice.delta.content:
                        yield AIMessageChunk(content=choice.delta.content)
        counted = usage and _count(usage.prompt_tokens, usage.completion_tokens)
        yield _last_chunk("", model, reason, counted)

    def _open_client(self) -> Any:
        try:
            from openai import OpenAI
        except ImportError:
            raise MissingExtraError("ChatLorasmith(base_url=...)", "openai", "langchain") from None
        if self._client is None:
            key = self.api_key.get_secret_value() if self.api_key else "none"
            self._client = OpenAI(
                base_url=self.base_url, api_key=key, timeout=self.timeout, max_retries=self.max_retries
            )
        return self._client


def _to_message(message: BaseMessage) -> Message:
    role = message.role if hasattr(message, "role") else _ROLES.get(message.type)  # type: ignore[attr-defined]
    if role not in _ROLES.values() or getattr(message, "tool_calls", None):
        raise RecipeError(
            f"A message of the kind {message.type!r} was given, or one that calls tools. A model tuned by lorasmith "
            "is asked with system, human and AI messages; put what a tool found into a human message."
        )
    blocks = [message.content] if isinstance(message.content, str) else message.content
    texts = [block if isinstance(block, str) else block.get("text") for block in blocks]
    if None in texts:
        raise RecipeError("A message holds something else than text. This model reads text only.")
    return Message(role, "".join(texts))  # type: ignore[arg-type]


def _close(schema: Any) -> Any:
    """Return a JSON schema whose objects have no keys besides those that it names."""
    if isinstance(schema, list):
        return [_close(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _close(part) for name, part in schema.items()}
    has_names = closed.get("type") == "object" and "properties" in closed
    return {"additionalProperties": False, **closed} if has_names else closed


def _refuse_unknown(kwargs: dict[str, Any], doing: str) -> None:
    kwargs.pop("ls_structured_output_format", None)  # LangChain's own note to its tracers
    if kwargs:
        raise SettingsError(
            f"ChatLorasmith {doing} and does not know: {', '.join(sorted(kwargs))}. "
            "It knows model, temperature, top_p, max_tokens, seed and stop."
        )


def _count(prompt_tokens: int, answer_tokens: int) -> UsageMetadata:
    return UsageMetadata(
        input_tokens=prompt_tokens, output_tokens=answer_tokens, total_tokens=prompt_tokens + answer_tokens
    )


def _last_chunk(text: str, model: str, reason: str, usage: UsageMetadata | None) -> AIMessageChunk:
    return AIMessageChunk(
        content=text,
        response_metadata={"model_name": model, "finish_reason": reason},
        usage_metadata=usage,
        chunk_position="last",
    )


@contextmanager
def _explained(url: str | None) -> Iterator[None]:
    """Turn what the client of a server raises into our words."""
    import openai

    try:
        yield
    except openai.APIStatusError as fault:
        raise EndpointError(f"{url} refused with {fault.status_code}: {fault.message}") from fault
    except openai.APIConnectionError as fault:
        raise EndpointError(
            f"{url} cannot be asked: {fault.message.rstrip('.')}. Is the server running, and is this its address?"
        ) from fault
    except openai.APIError as fault:  # told by the server in the middle of its answer
        raise EndpointError(f"{url} did not finish its answer: {fault.message}") from fault
