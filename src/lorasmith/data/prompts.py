"""The prompt recipe: how a conversation becomes text, for training and for asking alike.

    Example --recipe--> Segment, Segment, ...        each: text, is it learnt, did a user type it

Every recipe is a Jinja template over ``messages``. To know which characters of its output are template and
which are content, the template is rendered once for each shape of conversation (roles, which contents are
empty) with a private-use character standing in for each content:

    shape      (user, assistant)
    rendered   <|im_start|>user\n [0] <|im_end|>\n<|im_start|>assistant\n [1] <|im_end|>\n
    learnt                                                                ^^^^^^^^^^^^^^^
    asking     <|im_start|>user\n [0] <|im_end|>\n<|im_start|>assistant\n  (stops where the answer starts)

A template is a program and may look at contents (most often it trims them). So every conversation is also
rendered directly, and the filled-in layout must equal that text; where the template strips white space the
layout follows, and where it does anything else the conversation is refused. A render takes some 60
microseconds, a quarter of what tokenising the row takes: a proof for every row is worth its price.
"""

import hashlib
import importlib.resources
import itertools
import json
import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorasmith.data.example import Example, Message
from lorasmith.data.settings import LearntTurns, PromptSettings, RowKind
from lorasmith.data.templates import render_template
from lorasmith.errors import RecipeError, SettingsError

TEXT = "text"  # the recipe without a template
_FIRST_SLOT = 0xF0000  # plane 15 is private use: no text and no template has these characters for a reason
_SLOT = re.compile("([\U000f0000-\U000ffffd])")


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered conversation.

    ``is_learnt``: its tokens are training targets. ``is_content``: a user typed it, so text in it that looks
    like a special token is ordinary text.
    """

    text: str
    is_learnt: bool
    is_content: bool


@dataclass(frozen=True, slots=True)
class _Part:
    """A piece of a layout: template text, or the place of a content (``slot`` is its index)."""

    text: str
    slot: int | None
    is_learnt: bool = False


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the template prints for one shape of conversation.

    ``folds_input``: the template has no place of its own for an input, so it stands below the instruction.
    ``rendered`` is the template's output, ``training`` the same with the learnt parts marked, an end token
    after every answer and nothing after the last one, ``num_asking`` the parts of ``training`` before the
    last answer.
    """

    folds_input: bool
    is_prompt_only: bool
    rendered: tuple[_Part, ...]
    training: tuple[_Part, ...]
    num_asking: int


@dataclass(frozen=True)
class PromptRecipe:
    """A conversation's way to text, complete: ``run.json`` needs nothing else to ask as was trained.

    ``template`` is the Jinja source. ``bos_token`` is what the template gets by that name (empty where the
    tokenizer has none), ``eos_token`` ends an answer where the template itself writes no special token
    after it. ``special_tokens`` are the texts that stand for one token when the template writes them.
    """

    name: str
    template: str
    system: str | None = None
    stop: tuple[str, ...] = ()
    learn: LearntTurns = "all"
    bos_token: str = ""
    eos_token: str = ""
    special_tokens: tuple[str, ...] = ()
    _layouts: dict[tuple, _Layout] = field(default_factory=dict, init=False, repr=False, compare=False)

    def render(self, example: Example) -> tuple[Segment, ...]:
        """Return the whole conversation, up to and including the end token of its last answer.

        A text without turns is written without the template, all of it learnt: by the recipe "text" alone.

        Raises:
            RecipeError: the template refuses the conversation or does not show all of it.
        """
        if example.is_text:
            return self._write_text(example.messages[0])
        return self._fill(self._with_system(example.messages), stops_before_answer=False)

    def _write_text(self, message: Message) -> tuple[Segment, ...]:
        assert self.name == TEXT, "a text is trained on without a template"
        if not self.eos_token:
            raise RecipeError(
                "the tokenizer has no eos_token, so no document can end: set it, or choose another base."
            )
        start = Segment(self.bos_token, is_learnt=False, is_content=False)
        end = Segment(self.eos_token if message.role == "document" else "", is_learnt=True, is_content=False)
        return start, Segment(message.content, is_learnt=True, is_content=True), end

    def render_prompt(self, messages: Sequence[Message]) -> tuple[Segment, ...]:
        """Return the text up to where the assistant's answer starts: the same as :meth:`render` gives there.

        Raises:
            RecipeError: as :meth:`render`, or ``messages`` do not end with a user's turn.
        """
        if not messages or messages[-1].role != "user":
            raise RecipeError("Nothing is asked: the last message must be the user's.")
        # Any answer will do, it is cut off; a slot character is one that no template strips or looks for.
        asked = (*self._with_system(messages), Message("assistant", chr(_FIRST_SLOT)))
        return self._fill(asked, stops_before_answer=True)

    def fingerprint(self) -> str:
        """Return the sha256 of three sample conversations as rendered, with the stop strings and ``learn``."""
        user, answer = Message("user", "When is payday?"), Message("assistant", "On the 1st.")
        samples = [
            (user, answer),
            (Message("user", "Translate.", input="xin chào"), answer),
            (user, answer, Message("user", "Why?"), Message("assistant", "It is the custom.")),
        ]
        rendered: list[Any] = []
        for messages in samples:
            try:
                segments = self.render(Example(messages, where="sample"))
                rendered.append([(part.text, part.is_learnt, part.is_content) for part in segments])
            except RecipeError as error:
                rendered.append(str(error))
        text = json.dumps([rendered, self.stop, self.learn, self.system])
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return plain values from which :meth:`from_json` makes the same recipe."""
        values = {k: v for k, v in asdict(self).items() if k != "_layouts"}
        values["stop"], values["special_tokens"] = list(self.stop), list(self.special_tokens)
        return {**values, "fingerprint": self.fingerprint()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "PromptRecipe":
        """Make the recipe that :meth:`to_json` wrote.

        Raises:
            RecipeError: a value is missing or unknown, or the recipe does not render its sample as it did.
        """
        values = dict(values)
        expected = values.pop("fingerprint", None)
        try:
            recipe = cls(
                **{**values, "stop": tuple(values["stop"]), "special_tokens": tuple(values["special_tokens"])}
            )
        except (KeyError, TypeError) as error:
            raise RecipeError(
                f"The saved prompt recipe is not complete: {error}. It is the part 'recipe' of run.json."
            ) from error
        if recipe.fingerprint() != expected:
            raise RecipeError(
                f"The saved prompt recipe {recipe.name!r} renders another text than the one that was "
                f"trained: its fingerprint is {recipe.fingerprint()[:12]}, {str(expected)[:12]} was saved. "
                "It was edited after the training; put the original run.json back, or train again."
            )
        return recipe

    def end_tokens(self) -> tuple[str, ...]:
        """Return the special tokens that end an answer, the last answer's first."""
        ends = []
        for turns in (1, 2):
            talk = (Message("user", "q"), Message("assistant", "a")) * turns
            try:
                segments = self.render(Example(talk, where="sample"))
            except RecipeError:
                continue
            learnt = [part.text for part in segments if part.is_learnt and not part.is_content]
            ends += reversed([self._first_special_token(text) for text in learnt])
        return tuple(dict.fromkeys([end for end in ends if end] + [self.eos_token]))

    def answer_lead(self) -> str:
        """Return the spaces that the template writes before an answer.

        Tokenizers keep them with the answer's first word, so the model learns and writes them; a reader does not
        want them.
        """
        talk = (Message("user", "q"), Message("assistant", "a"))
        try:
            segments = self.render(Example(talk, where="sample"))
        except RecipeError:  # a template that needs more than a question and an answer
            return ""
        return next((s.text for s in segments if s.is_learnt and not s.is_content and s.text.isspace()), "")

    def answer_marks(self) -> dict[str, Any]:
        """Return what bounds an answer beside end tokens, as plain values: what a chat template cannot say."""
        return {"stop_strings": list(self.stop), "answer_lead": self.answer_lead()}

    def stop_token_ids(self, tokenizer) -> tuple[int, ...]:
        """Return the ids at which an answer ends, the end token of the training text first.

        Raises:
            RecipeError: the tokenizer lacks an end token of the recipe; it is another base's tokenizer.
        """
        ids = []
        for token in dict.fromkeys((*self.end_tokens(), *(s for s in self.stop if s in self.special_tokens))):
            token_id = tokenizer.convert_tokens_to_ids(token)
            if token_id is None or tokenizer.convert_ids_to_tokens(token_id) != token:
                raise RecipeError(
                    f"The tokenizer has no token {token!r}, which ends an answer in the recipe "
                    f"{self.name!r}. Use the tokenizer of the base that was trained."
                )
            ids.append(token_id)
        return tuple(ids)

    def _with_system(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        if self.system is None or any(message.role == "system" for message in messages):
            return tuple(messages)
        return (Message("system", self.system), *messages)

    def _fill(self, messages: tuple[Message, ...], stops_before_answer: bool) -> tuple[Segment, ...]:
        shape = tuple((m.role, bool(m.content), bool(m.input)) for m in messages)
        layout = self._layouts.get(shape)
        if layout is None:
            layout = self._layouts[shape] = self._lay_out(messages)
        contents = _contents(messages, layout.folds_input)
        shown = messages[:-1] if layout.is_prompt_only else messages
        direct = self._render_directly(shown, layout.folds_input, asks=layout.is_prompt_only)
        filled = "".join([p.text if p.slot is None else contents[p.slot] for p in layout.rendered])
        if filled != direct:
            contents = _follow_stripping(layout.rendered, contents, direct)
        parts = layout.training[: layout.num_asking] if stops_before_answer else layout.training
        return tuple(
            [
                Segment(p.text, p.is_learnt, False)
                if p.slot is None
                else Segment(contents[p.slot], p.is_learnt, True)
                for p in parts
            ]
        )

    def _lay_out(self, messages: tuple[Message, ...]) -> _Layout:
        """Render the shape of ``messages`` with a private-use character in place of each content."""
        last = 2 * (len(messages) - 1)
        for folds_input in (False, True):
            marked = _mark(messages, folds_input)
            parts = _split_at_slots(self._render_directly(marked, folds_input=False, asks=False))
            is_prompt_only = last not in {part.slot for part in parts}
            if is_prompt_only:
                # The template writes a prompt and leaves the answer to us: "Question: ...\nAnswer: ".
                parts = _split_at_slots(self._render_directly(marked[:-1], folds_input=False, asks=True))
            missing = _slots(marked) - {part.slot for part in parts} - {last}
            if not any(slot % 2 for slot in missing):  # odd slots are inputs: try again with them folded in
                break
        self._check_all_is_shown(parts, missing, messages)
        training = self._mark_learnt([*parts, _Part("", last)] if is_prompt_only else parts, messages)
        num_asking = next(i for i, part in enumerate(training) if part.slot == last)
        if num_asking and training[num_asking - 1].text.isspace() and training[num_asking - 1].is_learnt:
            num_asking -= 1  # the space that goes with the answer
        return _Layout(folds_input, is_prompt_only, tuple(parts), tuple(training), num_asking)

    def _check_all_is_shown(
        self, parts: list[_Part], missing: set[int], messages: tuple[Message, ...]
    ) -> None:
        counts = [part.slot for part in parts if part.slot is not None]
        for index, message in enumerate(messages):
            if 2 * index in missing or 2 * index + 1 in missing:
                raise RecipeError(
                    f"the prompt template {self.name!r} does not show turn {index + 1} ({message.role}) of "
                    f"this conversation of {len(messages)} turns. Use --recipe chat or alpaca, or a "
                    "template that loops over messages."
                )
            if message.role == "assistant" and counts.count(2 * index) > 1:
                raise RecipeError(
                    f"the prompt template {self.name!r} shows the answer of turn {index + 1} twice"
                )

    def _mark_learnt(self, parts: Sequence[_Part], messages: tuple[Message, ...]) -> list[_Part]:
        """Mark each learnt answer with its end token; drop what follows the last one, which nobody learns."""
        last = 2 * (len(messages) - 1)
        answers = {2 * i for i, message in enumerate(messages) if message.role == "assistant"}
        marked: list[_Part] = []
        rest = deque(parts)
        while rest:
            part = rest.popleft()
            if part.slot not in answers:
                marked.append(part)
                continue
            is_learnt = self.learn == "all" or part.slot == last
            if marked and marked[-1].text.endswith(" "):
                # "Answer: " + "Paris": tokenizers keep a space with the word after it; the answer gets it.
                before = marked.pop().text
                kept = before.rstrip(" ")
                marked += [_Part(kept, None), _Part(before[len(kept) :], None, is_learnt)]
            follows = rest.popleft().text if rest and rest[0].slot is None else ""
            end, follows = self._split_after_end_token(follows)
            marked += [_Part("", part.slot, is_learnt), _Part(end, None, is_learnt)]
            if part.slot == last:
                return marked
            rest.appendleft(_Part(follows, None))
        raise AssertionError("the last answer was not in the layout")

    def _split_after_end_token(self, text: str) -> tuple[str, str]:
        """Split template text that follows an answer into (up to its first special token, the rest)."""
        end = self._special_token_pattern().search(text)
        if end:
            return text[: end.end()], text[end.end() :]
        if self.eos_token:
            return self.eos_token, text
        raise RecipeError(
            f"the prompt template {self.name!r} writes no special token after an answer, and the tokenizer "
            "has no eos_token: the tuned model could never stop. Set the tokenizer's eos_token."
        )

    def _first_special_token(self, text: str) -> str | None:
        match = self._special_token_pattern().search(text)
        return match.group() if match else None

    def _special_token_pattern(self) -> re.Pattern[str]:
        return special_token_pattern((*self.special_tokens, self.eos_token))

    def _render_directly(self, messages: Sequence[Message], folds_input: bool, asks: bool) -> str:
        turns = []
        for message in messages:
            turn = {"role": message.role, "content": message.content}
            if message.input and folds_input:
                turn["content"] = _fold(message)
            elif message.input:
                turn["input"] = message.input
            turns.append(turn)
        variables: dict[str, Any] = {"messages": turns, "add_generation_prompt": asks}
        if self.bos_token:
            variables["bos_token"] = self.bos_token
        if self.eos_token:
            variables["eos_token"] = self.eos_token
        if self.name != "chat":  # a tokenizer's own template gets exactly what transformers gives it
            user = next((turn for turn in reversed(turns) if turn["role"] == "user"), {})
            system = next((turn["content"] for turn in turns if turn["role"] == "system"), "")
            variables |= {
                "instruction": user.get("content", ""),
                "input": user.get("input", ""),
                "system": system,
            }
        return render_template(self.template, variables)


def choose_recipe(settings: PromptSettings, tokenizer, kind: RowKind = "answers") -> tuple[PromptRecipe, str]:
    """Return the recipe that ``settings`` name for this tokenizer, and the reason in words for the screen.

    ``kind``: what is learnt. Of "documents" the recipe says how the tuned model is asked; of "pairs" and "labelled" the
    last answer alone is compared, whatever ``settings.learn`` says.

    Raises:
        RecipeError: "chat" without a chat template, or a template that is not Jinja.
        SettingsError: ``settings.recipe`` is neither a known name nor a file, or is of another kind.
    """
    chat_template = _chat_template(tokenizer)
    name, reason = settings.recipe, "as set"
    if name == "auto":
        name = "chat" if chat_template else (TEXT if kind == "documents" else "alpaca")
        reason = (
            "the tokenizer has a chat template" if chat_template else "the tokenizer has no chat template"
        )
    if name == TEXT and kind != "documents":
        raise SettingsError(
            "prompt.recipe is text, which goes on with what is asked: a question and its answer would be one text. "
            "It belongs to objective.name=text; for answers use chat, alpaca or a template of your own."
        )
    # A chat template writes its own beginning; other templates get a bos_token where the tokenizer adds one.
    bos_token = (tokenizer.bos_token or "") if name == "chat" or adds_bos(tokenizer) else ""
    if name == "chat":
        if not chat_template:
            raise RecipeError(
                "The recipe is chat, but the tokenizer has no chat template. Use --recipe alpaca."
            )
        template = chat_template
    elif name in ("alpaca", TEXT):
        recipes = importlib.resources.files("lorasmith.data") / "recipes"
        template = (recipes / f"{name}.jinja").read_text("utf-8")
    else:
        name, template = _read_template(name)
    recipe = PromptRecipe(
        name=name,
        template=template,
        system=settings.system,
        stop=settings.stop,
        learn="last" if kind in ("pairs", "labelled") else settings.learn,
        bos_token=bos_token,
        eos_token=tokenizer.eos_token or "",
        special_tokens=special_tokens(tokenizer),
    )
    return recipe, reason


def special_tokens(tokenizer) -> tuple[str, ...]:
    """Return the texts of the tokenizer's special tokens, in the order of their ids."""
    added = tokenizer.added_tokens_decoder
    marked = {added[i].content: None for i in sorted(added) if added[i].special}
    return tuple(marked | dict.fromkeys(tokenizer.all_special_tokens))


def special_token_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of ``tokens``, the longest where several begin at one place."""
    alternatives = sorted({token for token in tokens if token}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, alternatives)) or r"(?!)")


def _chat_template(tokenizer) -> str | None:
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def adds_bos(tokenizer) -> bool:
    """Return whether the tokenizer puts its bos_token before every text."""
    if tokenizer.bos_token_id is None:
        return False
    return tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def _read_template(path_text: str) -> tuple[str, str]:
    try:
        path = Path(path_text).expanduser()
        template = path.read_text("utf-8-sig")
    except (OSError, ValueError, RuntimeError) as error:  # not UTF-8; U+0000 in the name; ~nobody
        raise SettingsError(
            f"prompt.recipe: {path_text[:200]!r} is not auto, alpaca, chat or text, and cannot be read as a template "
            f"file ({error}). Give one of the four names, or the path of a .jinja file in UTF-8."
        ) from error
    name = path.name if path.stem in ("auto", "alpaca", "chat", TEXT) else path.stem
    return name, template


def _fold(message: Message) -> str:
    return f"{message.content}\n\n{message.input}"


def _contents(messages: Sequence[Message], folds_input: bool) -> list[str]:
    """Return the text of every slot: 2i is the content of message i, 2i + 1 its input."""
    pairs = [(_fold(m), "") if folds_input and m.input else (m.content, m.input) for m in messages]
    return list(itertools.chain.from_iterable(pairs))


def _mark(messages: Sequence[Message], folds_input: bool) -> list[Message]:
    """Return the same conversation with the slot's character in place of each text that is not empty."""
    return [
        Message(
            m.role,
            chr(_FIRST_SLOT + 2 * i) if m.content else "",
            chr(_FIRST_SLOT + 2 * i + 1) if m.input and not folds_input else "",
        )
        for i, m in enumerate(messages)
    ]


def _slots(marked: Sequence[Message]) -> set[int]:
    return {ord(text) - _FIRST_SLOT for m in marked for text in (m.content, m.input) if text}


def _split_at_slots(rendered: str) -> list[_Part]:
    pieces = _SLOT.split(rendered)  # text, slot, text, slot, ..., text
    return [
        _Part("", ord(piece) - _FIRST_SLOT) if i % 2 else _Part(piece, None)
        for i, piece in enumerate(pieces)
        if i % 2 or piece
    ]


def _follow_stripping(parts: Sequence[_Part], contents: list[str], direct: str) -> list[str]:
    """Return the contents as the template stripped them.

    Raises:
        RecipeError: stripping white space does not explain the text that the template printed.
    """
    followed = list(contents)
    position = 0
    for i, part in enumerate(parts):
        if part.slot is not None:
            content = contents[part.slot]
            rest = itertools.takewhile(lambda p: p.slot is None, parts[i + 1 :])
            after = "".join(p.text for p in rest)
            for candidate in (content, content.strip(), content.rstrip(), content.lstrip()):
                end = position + len(candidate)
                if direct.startswith(candidate, position) and direct.startswith(after, end):
                    followed[part.slot] = candidate
                    break
        position += len(part.text if part.slot is None else followed[part.slot])
    if "".join(p.text if p.slot is None else followed[p.slot] for p in parts) != direct:
        raise RecipeError(
            "the prompt template changes the text of this conversation in a way that cannot be followed, so "
            "what is learnt would not be what was written. Use --recipe alpaca, or a template that prints "
            "contents as they are."
        )
    return followed
