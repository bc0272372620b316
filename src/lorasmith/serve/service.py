"""Requests -> rows -> the parts of their answers: what stands between the routes and the thread with the model."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorasmith.data.example import Message
from lorasmith.errors import LorasmithError, OverlongError, RecipeError
from lorasmith.generation.sampling import SamplingSettings
from lorasmith.serve.adapters import MAX_SIDE_BY_SIDE
from lorasmith.serve.batch import Batch, Delta, Row
from lorasmith.serve.faults import RequestError
from lorasmith.serve.guide import Guide, compile_schema
from lorasmith.serve.metrics import Metrics
from lorasmith.serve.models import ServedModel, ServedModels
from lorasmith.serve.scheduler import Scheduler
from lorasmith.serve.schema import CompletionRequest
from lorasmith.serve.settings import ServeSettings


class Answering:
    """The answers to one request while they are written: iterate over (which answer, its next part).

    Raises while iterating: LorasmithError, if an answer cannot be finished.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._parts: asyncio.Queue[tuple[int, Delta | LorasmithError]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self.started = time.monotonic()
        self.first_part: float | None = None

    def tell(self, index: int, part: Delta | LorasmithError) -> None:
        """Take a part from the thread with the model."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._parts.put_nowait, (index, part))

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        unfinished = len(self.rows)
        while unfinished:
            index, part = await self._parts.get()
            if isinstance(part, LorasmithError):
                raise part
            if self.first_part is None:
                self.first_part = time.monotonic()
            unfinished -= part.finish_reason is not None
            yield index, part

    @property
    def prompt_tokens(self) -> int:
        """Of the request: a prompt that has several answers counts once."""
        return sum({id(row.prompt_ids): len(row.prompt_ids) for row in self.rows}.values())

    @property
    def cached_tokens(self) -> int:
        """Of the prompt, those that were not read for this request."""
        return sum({id(row.prompt_ids): row.shared for row in reversed(self.rows)}.values())

    @property
    def completion_tokens(self) -> int:
        return sum(len(row.writer.token_ids) for row in self.rows)


class Service:
    """Asks the served models. Every front end of the server goes through :meth:`ask`: the routes, the studio."""

    def __init__(self, models: ServedModels, settings: ServeSettings) -> None:
        self.models, self.settings = models, settings
        batch = Batch(
            models.model,
            max_rows=settings.max_rows,
            cache_tokens=settings.cache_tokens,
            kept_tokens=settings.kept_tokens,
            chunk_tokens=settings.chunk_tokens,
        )
        self.metrics = Metrics()
        self.scheduler = Scheduler(
            batch, max_waiting=settings.max_waiting, max_rows=settings.max_rows, note=self.metrics.note_row
        )
        self.metrics.watch(self.scheduler, batch)
        self._vocab_size = models.model.config.get_text_config(decoder=True).vocab_size

    def find_model(self, name: str) -> ServedModel:
        """Return the model that a request names.

        Raises:
            RequestError: there is none of that name.
        """
        if model := self.models.find(name):
            return model
        names = ", ".join(model.name for model in self.models.list())
        raise RequestError(
            f"There is no model {name!r:.140} here. Served are: {names}.",
            status=404,
            type="not_found_error",
            param="model",
            code="model_not_found",
        )

    def encode_messages(
        self, model: ServedModel, messages: Sequence[Message], *, override_system: bool = False
    ) -> list[int]:
        """Return the ids of a conversation as the model's own recipe renders it.

        Raises:
            RecipeError: the recipe cannot render it, or it has another system prompt than the trained one and no
                leave.
        """
        allowed = override_system or self.settings.override_system
        return model.chat.encode_prompt(messages, override_system=allowed)

    def encode_prompts(self, model: ServedModel, asked: CompletionRequest) -> list[list[int]]:
        """Return the ids of each prompt: of a question in the model's recipe, or of the text as it stands if ``raw``.

        Raises:
            RequestError: an id that the model does not have. RecipeError: as ``encode_messages``.
        """
        prompts = asked.prompts
        for prompt in prompts:
            if not isinstance(prompt, str) and not all(
                0 <= token_id < self._vocab_size for token_id in prompt
            ):
                raise RequestError(f"A token id is not between 0 and {self._vocab_size - 1}.", param="prompt")
        return [
            list(prompt) if not isinstance(prompt, str) else self._encode_text(model, prompt, asked.raw)
            for prompt in prompts
        ]

    def _encode_text(self, model: ServedModel, text: str, is_raw: bool) -> list[int]:
        if not is_raw:
            return self.encode_messages(model, [Message("user", text)])
        return [int(token_id) for token_id in model.chat.tokenizer(text)["input_ids"]]  # pyright: ignore

    async def ask(
        self,
        model: ServedModel,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingSettings,
        *,
        num_choices: int = 1,
        num_top: int | None = None,
        schema: Mapping[str, Any] | None = None,
    ) -> Answering:
        """Begin ``num_choices`` answers to each prompt; choice i samples with ``seed`` + i.

        Raises:
            OverlongError, BusyError, StoppedError, SettingsError: nothing was begun.
        """
        limit = min(self.settings.max_prompt_tokens, self.settings.cache_tokens - 1)
        for prompt in prompts:
            if len(prompt) > limit:
                raise OverlongError(
                    f"The prompt has {len(prompt)} tokens; this server reads at most {limit}. Shorten the question, or "
                    "leave out earlier turns."
                )
            if not prompt:
                raise RecipeError("The prompt is empty. Ask something.")
        answering = Answering()
        guide = None if schema is None else await asyncio.to_thread(self._compile, model, schema)
        for prompt in prompts:
            for choice in range(num_choices):
                own = sampling
                if sampling.seed is not None:
                    own = sampling.model_copy(update={"seed": (sampling.seed + choice) % 2**63})
                answering.rows.append(
                    self._row(model, prompt, own, num_top, guide and guide.copy(), answering)
                )
        self.scheduler.submit(answering.rows)
        return answering

    def _row(
        self,
        model: ServedModel,
        prompt: Sequence[int],
        sampling: SamplingSettings,
        num_top: int | None,
        guide: Guide | None,
        answering: Answering,
    ) -> Row:
        room = self.settings.cache_tokens - len(prompt)
        fitting = sampling.model_copy(update={"max_tokens": min(sampling.max_tokens, room)})
        index = len(answering.rows)
        return Row(
            prompt_ids=prompt,
            adapter=model.adapter,
            sampling=fitting,
            writer=model.chat.new_writer(prompt, fitting),
            tell=lambda part: answering.tell(index, part),
            num_top=num_top,
            guide=guide,
        )

    def _compile(self, model: ServedModel, schema: Mapping[str, Any]) -> Guide:
        return compile_schema(
            schema,
            model.chat.tokenizer,
            end_token_ids=model.chat.stop_token_ids,
            vocab_size=self._vocab_size,
        )

    def warm_up(self) -> None:
        """Answer a word with each model, so that no client waits for what the first forward needs.

        Raises:
            FailedError: not even that could be computed.
        """
        done = threading.Semaphore(0)
        faults: list[LorasmithError] = []

        def tell(part: Delta | LorasmithError) -> None:
            if isinstance(part, LorasmithError):
                faults.append(part)
            done.release()

        models = self.models.list()[-min(MAX_SIDE_BY_SIDE, self.settings.max_waiting) :]
        sampling = SamplingSettings(max_tokens=2)
        rows = []
        for model in models:
            prompt = model.chat.encode_prompt("Hi")
            writer = model.chat.new_writer(prompt, sampling)
            rows.append(Row(prompt, model.adapter, sampling, writer, tell))
        self.scheduler.submit(rows)
        for row in rows:
            while not (row.is_over or faults) and self.scheduler.is_alive:
                done.acquire(timeout=1)
        if faults:
            raise faults[0]

    def cancel(self, answering: Answering) -> None:
        """Stop what is not finished of a request."""
        unfinished = [row for row in answering.rows if not row.is_over]
        if unfinished:
            self.scheduler.cancel(unfinished)

    def load(self, name: str, folder: Path, *, replaces: bool = False) -> ServedModel:
        """Serve the run or adapter in ``folder`` as ``name``; with ``replaces`` in the place of another.

        Raises:
            LorasmithError: it cannot be served here, or the name is taken.
        """
        old = self.models.find(name)
        loaded = self.models.load(name, folder, replaces=replaces)
        if old is not None and old.adapter is not None:
            self.scheduler.forget(old.adapter)
        return loaded

    def unload(self, name: str) -> None:
        """Stop serving an adapter and give its memory back; answers under way go on.

        Raises:
            RequestError: there is no adapter of that name.
        """
        gone = self.models.unload(name)
        if gone is None:
            self.find_model(name)
            raise RequestError(f"{name} is the base, which stays.", param="lora_name")
        assert gone.adapter is not None
        self.scheduler.forget(gone.adapter)

    def stop(self) -> None:
        """Tell everybody whose answer is not finished that it will not be."""
        self.scheduler.stop()

    def close(self) -> None:
        self.scheduler.close()
