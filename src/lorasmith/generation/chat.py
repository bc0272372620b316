"""Chat: the one object that every front end asks through, so that all give the same answer.

question or messages -> PromptRecipe.render_prompt -> token ids -> decode -> Piece, Piece, ... = Answer
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorasmith.data.example import Message
from lorasmith.data.prompts import PromptRecipe
from lorasmith.data.tokens import encode
from lorasmith.errors import AdapterError, OverlongError, RecipeError
from lorasmith.generation.decode import KeptTurn, NextToken, decode, decode_many
from lorasmith.generation.sampler import Sampler
from lorasmith.generation.sampling import SamplingSettings
from lorasmith.generation.stream import Answer, AnswerWriter, FinishReason, Piece
from lorasmith.model.device import DeviceChoice, choose_device
from lorasmith.model.found import FoundModel, Tell, find_model, find_run, say_nothing

Question = str | Sequence[Message]

GREEDY = SamplingSettings()


class Chat:
    """A model, its tokenizer and the prompt recipe it was trained with.

    Answers end at the recipe's stop tokens and stop strings, and at the end tokens that the base's own
    generation config names; none of them is part of the text. Settings such as a repetition penalty in that
    config are not applied: ``SamplingSettings`` says all there is.

    ``name`` says what is asked, ``notes`` what a user should know about it (a guessed recipe, for one).
    ``found`` is what the model was loaded from; None where it was handed in.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        recipe: PromptRecipe,
        *,
        name: str = "",
        notes: Sequence[str] = (),
        found: FoundModel | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.recipe = recipe
        self.name = name
        self.notes = tuple(notes)
        self.found = found
        self._next_token = NextToken(model)
        self._kept = KeptTurn([])
        self._lead = recipe.answer_lead()
        self.stop_token_ids = frozenset(recipe.stop_token_ids(tokenizer)) | _end_tokens(model)
        added = tokenizer.added_tokens_decoder  # pyright: ignore[reportAttributeAccessIssue]
        special = {token_id for token_id, token in added.items() if token.special}
        self._hidden_token_ids = frozenset(special | set(tokenizer.all_special_ids))

    @classmethod
    def open(cls, found: FoundModel, *, device: str = "auto", dtype: str = "auto") -> "Chat":
        """Load what ``find_model`` found, to be asked as it was trained."""
        model = found.load(choose_device(device, dtype))
        return cls(model, found.tokenizer, found.recipe, name=found.name, notes=found.notes, found=found)

    @classmethod
    def from_run(
        cls,
        run_dir: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        base: str | None = None,
        tell: Tell = say_nothing,
    ) -> "Chat":
        """Open a finished run. ``base`` is where its base model lies now, if it was moved.

        Raises:
            RunError: no readable run.json. BaseModelError: the weights are not those of the run. RecipeError: the
                recipe renders another text than it did then. AdapterError: it is missing, broken or not finished.
        """
        return cls.open(find_run(Path(run_dir), base=base, tell=tell), device=device, dtype=dtype)

    def base(self) -> "Chat":
        """Return a Chat over the same weights with the adapter off. Both may be asked in turn.

        Of a model whose own weights were trained, it is what that began as, loaded beside it.
        """
        if self.found is not None and self.found.tuned_from is not None:
            origin = self.found.before_tuning()
            model = self._next_token.model
            choice = DeviceChoice(model.device, model.dtype, "as the tuned model")
            untuned = origin.load(choice)
            name = f"{self.name} (untuned)"
            return Chat(untuned, self.tokenizer, self.recipe, name=name, found=origin)
        if not isinstance(self._next_token.model, PeftModel):
            raise AdapterError(
                f"{self.name or 'This model'} has no adapter to switch off: it is a whole model."
            )
        found = self.found and self.found.before_tuning()
        name = f"{self.name} (untuned)"
        chat = Chat(self._next_token.model, self.tokenizer, self.recipe, name=name, found=found)
        chat._next_token = self._next_token.without_adapter()
        return chat

    @contextmanager
    def answering(self) -> Iterator[PreTrainedModel | PeftModel]:
        """Lend the model as this Chat asks it: without dropout, its adapter on or off. Nobody else asks meanwhile."""
        with self._next_token.answering() as model:
            yield model

    @property
    def max_context(self) -> int | None:
        """The longest sequence the model was made for, in tokens; None where its config names none."""
        return self._next_token.max_context

    @property
    def weights(self) -> str | None:
        """What an answer depends on beside its question: a name of the weights and how they are computed."""
        model = self._next_token.model
        return self.found and f"{self.found.fingerprint()} {model.dtype} {model.device.type}"

    def ask(
        self,
        question: Question,
        *,
        input: str = "",
        system: str | None = None,
        override_system: bool = False,
        sampling: SamplingSettings = GREEDY,
    ) -> Answer:
        """Answer a question, or the last turn of a conversation.

        ``input`` is an Alpaca question's context. ``system`` other than the trained system prompt is refused
        unless ``override_system``.

        Raises:
            RecipeError: the question is empty, or the recipe cannot render it.
            OverlongError: it does not fit the model's context.
        """
        prompt_ids = self.encode_prompt(question, input=input, system=system, override_system=override_system)
        writer = self.new_writer(prompt_ids, sampling)
        start = time.perf_counter()
        for _ in decode(self._next_token, prompt_ids, Sampler(sampling), writer, self._kept):
            pass
        return _read_answer(writer, len(prompt_ids), time.perf_counter() - start)

    def stream(
        self,
        question: Question,
        *,
        input: str = "",
        system: str | None = None,
        override_system: bool = False,
        sampling: SamplingSettings = GREEDY,
    ) -> Iterator[Piece]:
        """Answer as ``ask`` does, piece by piece. Faults of the question are raised by this call itself."""
        prompt_ids = self.encode_prompt(question, input=input, system=system, override_system=override_system)
        return self._stream(prompt_ids, self.new_writer(prompt_ids, sampling), sampling)

    def _stream(
        self, prompt_ids: list[int], writer: AnswerWriter, sampling: SamplingSettings
    ) -> Iterator[Piece]:
        start = time.perf_counter()
        num_told = 0
        for text in decode(self._next_token, prompt_ids, Sampler(sampling), writer, self._kept):
            if text or writer.finish_reason:
                token_ids = tuple(writer.token_ids[num_told:])
                num_told = len(writer.token_ids)
                yield Piece(text, token_ids, writer.finish_reason, num_told / (time.perf_counter() - start))

    def ask_many(
        self,
        questions: Sequence[Question],
        *,
        sampling: SamplingSettings = GREEDY,
        on_answer: Callable[[int, Answer], None] = lambda place, answer: None,
        batch_size: int = 64,
    ) -> list[Answer]:
        """Answer many questions at once, in the order asked; in float32 as ``ask`` answers each.

        ``on_answer`` is called with a question's place and its answer as soon as that is finished. An answer's
        ``seconds`` run from the beginning of the whole call.
        """
        prompts = [self.encode_prompt(question) for question in questions]
        writers = [self.new_writer(prompt, sampling) for prompt in prompts]
        start = time.perf_counter()
        answers: dict[int, Answer] = {}

        def note_finished() -> None:
            seconds = time.perf_counter() - start
            for place, writer in enumerate(writers):
                if writer.finish_reason is not None and place not in answers:
                    answers[place] = _read_answer(writer, len(prompts[place]), seconds)
                    on_answer(place, answers[place])

        decode_many(
            self._next_token,
            prompts,
            Sampler(sampling),
            writers,
            batch_size=batch_size,
            on_finished=note_finished,
        )
        return [answers[place] for place in range(len(prompts))]

    def encode_prompt(
        self, question: Question, *, input: str = "", system: str | None = None, override_system: bool = False
    ) -> list[int]:
        """Return the ids that the model sees: the trained recipe's text up to where the answer begins."""
        messages = (Message("user", question, input),) if isinstance(question, str) else tuple(question)
        if not messages or messages[-1].role != "user":
            raise RecipeError("A conversation to be answered must end with a user's message.")
        if not messages[-1].content.strip():
            raise RecipeError("The question is empty. Ask something.")
        if system is not None:
            if messages[0].role == "system":
                raise RecipeError("A system prompt was given twice: as system= and as the first message.")
            messages = (Message("system", system), *messages)
        if not override_system:
            self._check_system(messages[0])
        ids, _ = encode(self.recipe.render_prompt(messages), self.tokenizer)
        return [int(token_id) for token_id in ids]

    def _check_system(self, first: Message) -> None:
        trained = self.recipe.system
        if first.role == "system" and trained is not None and first.content != trained:
            raise RecipeError(
                f"This model was trained with the system prompt {trained!r} and answers as trained only "
                f"under it; asked for was {first.content!r}. Leave the system prompt out, or override it in "
                "so many words (--override-system, override_system=True)."
            )

    def new_writer(self, prompt_ids: Sequence[int], sampling: SamplingSettings) -> AnswerWriter:
        """Return what an answer to the prompt is written into, token by token, by whoever decodes it.

        Raises:
            OverlongError: the prompt leaves the model's context no room.
        """
        longest = self.max_context
        room = sampling.max_tokens if longest is None else longest - len(prompt_ids)
        if room < 1:
            raise OverlongError(
                f"The question has {len(prompt_ids)} tokens with its prompt; the model reads at most "
                f"{longest}, its answer included. Shorten the question, or leave out earlier turns."
            )
        return AnswerWriter(
            self.tokenizer,
            stop_token_ids=self.stop_token_ids,
            hidden_token_ids=self._hidden_token_ids,
            stop=(*self.recipe.stop, *sampling.stop),
            max_tokens=min(sampling.max_tokens, room),
            lead=self._lead,
        )


def open_chat(
    source: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    tell: Tell = say_nothing,
    base: str | None = None,
    recipe: PromptRecipe | None = None,
) -> Chat:
    """Open whatever can be asked: a run folder, an adapter folder, a merged folder, or a base model's name.

    ``base`` and ``recipe`` as for ``find_model``: where the folder does not know them itself.
    """
    return Chat.open(find_model(source, base=base, recipe=recipe, tell=tell), device=device, dtype=dtype)


def _read_answer(writer: AnswerWriter, prompt_tokens: int, seconds: float) -> Answer:
    reason: FinishReason | None = writer.finish_reason
    assert reason is not None, "the answer is still being written"
    return Answer(writer.text, tuple(writer.token_ids), prompt_tokens, reason, seconds)


def _end_tokens(model: PreTrainedModel | PeftModel) -> frozenset[int]:
    """Return the end tokens of the model's generation config: several for some chat models."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
