"""Chat: the one object that every front end asks through, so that all give the same answer.

question or messages -> PromptRecipe.render_prompt -> token ids -> decode -> Piece, Piece, ... = Answer
"""

import difflib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorasmith.data.example import Message
from lorasmith.data.prompts import PromptRecipe, choose_recipe
from lorasmith.data.settings import PromptSettings
from lorasmith.data.tokens import encode
from lorasmith.errors import AdapterError, OverlongError, RecipeError, RunError
from lorasmith.generation.decode import KeptTurn, NextToken, decode, decode_many
from lorasmith.generation.sampler import Sampler
from lorasmith.generation.sampling import SamplingSettings
from lorasmith.generation.stream import Answer, AnswerWriter, FinishReason, Piece
from lorasmith.model.adapter import load_adapter, named_base, read_adapter_config
from lorasmith.model.base import (
    ResolvedBase,
    check_same_base,
    load_base,
    load_tokenizer,
    reopen_base,
    resolve_base,
)
from lorasmith.model.device import choose_device
from lorasmith.model.run_record import read_run_record
from lorasmith.model.settings import BaseSettings

Question = str | Sequence[Message]

Tell = Callable[[str], None]

GREEDY = SamplingSettings()


def say_nothing(line: str) -> None:
    """Take what is told while something slow begins, and keep quiet."""


class Chat:
    """A model, its tokenizer and the prompt recipe it was trained with.

    Answers end at the recipe's stop tokens and stop strings, and at the end tokens that the base's own
    generation config names; none of them is part of the text. Settings such as a repetition penalty in that
    config are not applied: ``SamplingSettings`` says all there is.

    ``name`` says what is asked, ``notes`` what a user should know about it (a guessed recipe, for one).
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        recipe: PromptRecipe,
        *,
        name: str = "",
        notes: Sequence[str] = (),
    ) -> None:
        self.tokenizer = tokenizer
        self.recipe = recipe
        self.name = name
        self.notes = tuple(notes)
        self._next_token = NextToken(model)
        self._kept = KeptTurn([])
        self._lead = recipe.answer_lead()
        self._stop_token_ids = frozenset(recipe.stop_token_ids(tokenizer)) | _end_tokens(model)
        added = tokenizer.added_tokens_decoder  # pyright: ignore[reportAttributeAccessIssue]
        special = {token_id for token_id, token in added.items() if token.special}
        self._hidden_token_ids = frozenset(special | set(tokenizer.all_special_ids))

    @classmethod
    def from_run(
        cls,
        run_dir: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        tell: Tell = say_nothing,
        adapter: bool | Path = True,
        base: str | None = None,
    ) -> "Chat":
        """Open a finished run; ``adapter=False`` asks its untuned base with the same recipe.

        ``adapter`` may name another adapter of the run: that of a checkpoint.

        ``base`` is where the base model lies now, if it was moved since the run.

        Raises: RunError without a readable run.json; BaseModelError when the weights are not those of the
        run; RecipeError when the recipe renders another text than it did then; AdapterError.
        """
        run_dir = Path(run_dir)
        record = read_run_record(run_dir)
        recipe = PromptRecipe.from_json(record.recipe)
        if base is None:
            found = reopen_base(record.base, tell=tell)
        else:
            found = resolve_base(BaseSettings(model=base), tell=tell)
            check_same_base(record.base, found)
        trusted = bool(record.settings.get("base", {}).get("trust_remote_code"))
        model = load_base(found, choose_device(device, dtype), trust_remote_code=trusted)
        tokenizer = load_tokenizer(found, trust_remote_code=trusted)
        if not adapter:
            return cls(model, tokenizer, recipe, name=f"{record.base.id} (untuned)")
        folder = adapter if isinstance(adapter, Path) else run_dir / "adapter"
        return cls(load_adapter(model, folder), tokenizer, recipe, name=str(run_dir))

    @classmethod
    def from_adapter(
        cls,
        folder: str | Path,
        *,
        base: str | None = None,
        recipe: PromptRecipe | None = None,
        device: str = "auto",
        dtype: str = "auto",
        tell: Tell = say_nothing,
    ) -> "Chat":
        """Open a plain PEFT folder, which knows its base's name but not the recipe it was trained with.

        Without ``recipe`` the tokenizer's chat template is used (of the tokenizer in the adapter folder, if
        there is one), and ``notes`` says so.
        """
        folder = Path(folder)
        name = base or named_base(read_adapter_config(folder), folder)
        found = resolve_base(BaseSettings(model=name), tell=tell)
        has_tokenizer = (folder / "tokenizer_config.json").is_file()
        tokenizer = load_tokenizer(ResolvedBase(found.ref, folder) if has_tokenizer else found)
        recipe, notes = _settle_recipe(
            recipe, tokenizer, f"{folder} has no run.json, so how it was prompted in training is not known. "
        )
        model = load_adapter(load_base(found, choose_device(device, dtype)), folder)
        return cls(model, tokenizer, recipe, name=str(folder), notes=notes)

    @classmethod
    def from_folder(
        cls,
        model: str | Path,
        *,
        recipe: PromptRecipe | None = None,
        device: str = "auto",
        dtype: str = "auto",
        tell: Tell = say_nothing,
    ) -> "Chat":
        """Open a whole model: a merged folder (its lorasmith.json holds the recipe), or any base model."""
        found = resolve_base(BaseSettings(model=str(model)), tell=tell)
        tokenizer = load_tokenizer(found)
        written_by_merge = Path(model) / "lorasmith.json"
        notes: tuple[str, ...] = ()
        if recipe is None and written_by_merge.is_file():
            recipe = _read_recipe(written_by_merge)
        else:
            recipe, notes = _settle_recipe(recipe, tokenizer)
        return cls(
            load_base(found, choose_device(device, dtype)), tokenizer, recipe, name=str(model), notes=notes
        )

    def base(self) -> "Chat":
        """Return a Chat over the same weights with the adapter off. Both may be asked in turn."""
        if not isinstance(self._next_token.model, PeftModel):
            raise AdapterError(
                f"{self.name or 'This model'} has no adapter to switch off: it is a whole model."
            )
        chat = Chat(self._next_token.model, self.tokenizer, self.recipe, name=f"{self.name} (untuned)")
        chat._next_token = self._next_token.without_adapter()
        return chat

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

        Raises: RecipeError for a question that is empty or that the recipe cannot render; OverlongError when
        it does not fit the model's context.
        """
        prompt_ids = self.encode_prompt(question, input=input, system=system, override_system=override_system)
        writer = self._new_writer(prompt_ids, sampling)
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
        return self._stream(prompt_ids, self._new_writer(prompt_ids, sampling), sampling)

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
        progress: Callable[[int, int], None] | None = None,
        batch_size: int = 32,
    ) -> list[Answer]:
        """Answer many questions at once, in the order asked; in float32 as ``ask`` answers each.

        ``progress`` is called with (answers done, answers asked for). An answer's ``seconds`` run from the
        beginning of the whole call.
        """
        prompts = [self.encode_prompt(question) for question in questions]
        if not prompts:
            return []
        writers = [self._new_writer(prompt, sampling) for prompt in prompts]
        start = time.perf_counter()
        finished_after: dict[int, float] = {}

        def note_finished() -> None:
            now = time.perf_counter() - start
            for row, writer in enumerate(writers):
                if writer.finish_reason is not None:
                    finished_after.setdefault(row, now)
            if progress is not None:
                progress(len(finished_after), len(writers))

        decode_many(
            self._next_token,
            prompts,
            Sampler(sampling),
            writers,
            batch_size=batch_size,
            on_finished=note_finished,
        )
        return [
            _read_answer(writer, len(prompts[row]), finished_after[row]) for row, writer in enumerate(writers)
        ]

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

    def _new_writer(self, prompt_ids: Sequence[int], sampling: SamplingSettings) -> AnswerWriter:
        longest = self._next_token.max_context
        room = sampling.max_tokens if longest is None else longest - len(prompt_ids)
        if room < 1:
            raise OverlongError(
                f"The question has {len(prompt_ids)} tokens with its prompt; the model reads at most "
                f"{longest}, its answer included. Shorten the question, or leave out earlier turns."
            )
        return AnswerWriter(
            self.tokenizer,
            stop_token_ids=self._stop_token_ids,
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

    ``base`` and ``recipe`` matter only where the folder does not know them itself: ``base`` says where a
    run's or an adapter's base model lies, ``recipe`` is for folders without run.json and lorasmith.json.
    """
    folder = Path(source)
    if (folder / "run.json").is_file():
        return Chat.from_run(folder, device=device, dtype=dtype, tell=tell, base=base)
    for run_dir in list(folder.resolve().parents)[
        :3
    ]:  # runs/x/adapter, runs/x/checkpoints/step-000100/adapter
        if (folder / "adapter_config.json").is_file() and (run_dir / "run.json").is_file():
            return Chat.from_run(run_dir, adapter=folder, device=device, dtype=dtype, tell=tell, base=base)
    if (folder / "adapter_config.json").is_file():
        return Chat.from_adapter(folder, base=base, recipe=recipe, device=device, dtype=dtype, tell=tell)
    # A Hub id has a slash too, but its first part is no folder of runs here.
    runs_beside = (
        [] if folder.exists() else sorted(file.parent.name for file in folder.parent.glob("*/run.json"))
    )
    if runs_beside:
        near = difflib.get_close_matches(folder.name, runs_beside, n=1)
        hint = f"Did you mean {folder.parent / near[0]}?" if near else f"There are: {', '.join(runs_beside)}."
        raise RunError(f"There is no run {folder.name} in {folder.parent}. {hint}")
    return Chat.from_folder(source, recipe=recipe, device=device, dtype=dtype, tell=tell)


def _read_answer(writer: AnswerWriter, prompt_tokens: int, seconds: float) -> Answer:
    reason: FinishReason | None = writer.finish_reason
    assert reason is not None, "the answer is still being written"
    return Answer(writer.text, tuple(writer.token_ids), prompt_tokens, reason, seconds)


def _end_tokens(model: PreTrainedModel | PeftModel) -> frozenset[int]:
    """Return the end tokens of the model's generation config: several for some chat models."""
    config = getattr(model, "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


def _settle_recipe(
    recipe: PromptRecipe | None, tokenizer: PreTrainedTokenizerBase, why: str = ""
) -> tuple[PromptRecipe, tuple[str, ...]]:
    """Return the given recipe, or the one that suits the tokenizer and a note that says so."""
    if recipe is not None:
        return recipe, ()
    chosen, reason = choose_recipe(PromptSettings(), tokenizer)
    return chosen, (f"{why}It is asked with the recipe {chosen.name}: {reason}.",)


def _read_recipe(place: Path) -> PromptRecipe:
    """Return the recipe in a merged folder's lorasmith.json."""
    try:
        return PromptRecipe.from_json(json.loads(place.read_text(encoding="utf-8"))["recipe"])
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{place} holds no prompt recipe ({error}). Merge the run again.") from error
