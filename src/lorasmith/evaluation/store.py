"""What a model was found to answer, kept on disk: a report that is stopped or made again asks nothing twice.

    <cache>/evaluation/<weights>.jsonl      one line for each answer or loss, added as soon as it is there

The file is named by the weights, their number format and the versions that compute; a line by the prompt's tokens
and the longest answer. So the base's answers serve every run on that base.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from lorasmith.data.cache import cache_dir
from lorasmith.data.example import Message
from lorasmith.files import digest
from lorasmith.generation.chat import Chat
from lorasmith.generation.sampling import SamplingSettings
from lorasmith.generation.stream import FinishReason
from lorasmith.model.run_record import library_versions


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """What is kept of an answer."""

    text: str
    completion_tokens: int
    finish_reason: FinishReason


class KeptChat:
    """A Chat whose greedy answers are kept. A Chat whose weights were handed in has none to look up, and keeps none."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        self._file: Path | None = None
        self._kept: dict[str, Any] = {}
        self.num_looked_up = 0
        if chat.weights is not None:
            versions = library_versions()
            computed_by = [versions[name] for name in ("lorasmith", "torch", "transformers")]
            name = digest([chat.weights, *computed_by])
            self._file = cache_dir() / "evaluation" / f"{name[:32]}.jsonl"
            self._kept = _read_lines(self._file)

    def ask_many(
        self,
        questions: Sequence[Sequence[Message]],
        *,
        sampling: SamplingSettings,
        on_answer: Callable[[int, KeptAnswer], None] = lambda place, answer: None,
    ) -> list[KeptAnswer]:
        """Answer as ``Chat.ask_many`` does; what was answered before is looked up."""
        assert sampling.is_greedy, "a sampled answer is another each time"
        ends = [sampling.max_tokens, sampling.stop, self.chat.recipe.stop]
        keys = [digest([self.chat.encode_prompt(question), *ends]) for question in questions]
        answers: dict[int, KeptAnswer] = {}

        def note(place: int, answer: KeptAnswer) -> None:
            answers[place] = answer
            on_answer(place, answer)

        for place, key in enumerate(keys):
            if key in self._kept:
                self.num_looked_up += 1
                note(place, KeptAnswer(**self._kept[key]))
        new = [place for place in range(len(keys)) if place not in answers]

        def keep(among_new: int, answer: Any) -> None:
            place = new[among_new]
            given = KeptAnswer(answer.text, answer.completion_tokens, answer.finish_reason)
            self._keep(keys[place], {name: getattr(given, name) for name in KeptAnswer.__slots__})
            note(place, given)

        self.chat.ask_many([questions[place] for place in new], sampling=sampling, on_answer=keep)
        return [answers[place] for place in range(len(questions))]

    def remember(self, what: Sequence[Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return what ``compute`` gives for ``what``, plain values both, computed once."""
        key = digest(list(what))
        if key not in self._kept:
            self._keep(key, compute())
        return self._kept[key]

    def base(self) -> Self:
        """Return the same with the adapter off."""
        return type(self)(self.chat.base())

    def _keep(self, key: str, value: dict[str, Any]) -> None:
        self._kept[key] = value
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps([key, value]))  # after a line that was cut off, a new one


def _read_lines(file: Path) -> dict[str, Any]:
    """Return what is kept; a line that a killed process left unfinished is passed over."""
    kept = {}
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                key, value = json.loads(line)
            except ValueError:
                continue
            kept[key] = value
    return kept
