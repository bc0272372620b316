"""The one meaning of "an example": a conversation whose assistant turns can be learnt, or a plain text.

Every data format becomes this value, and every later stage starts from it.
"""

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant", "document", "part"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn, or a whole text: a "document", or a "part" of one that goes on in the next example.

    ``input`` is the Alpaca row's context for an instruction; only user turns of Alpaca rows have one.
    The prompt recipe decides where it stands.
    """

    role: Role
    content: str
    input: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """One row of data, as every format sees it.

    ``where`` names the row for error texts: ``train.jsonl:17``. ``is_rejected``: the last turn is an answer to
    turn away from: the second of a pair, or one that is labelled false.
    """

    messages: tuple[Message, ...]
    where: str
    is_rejected: bool = False

    @property
    def question(self) -> tuple[Message, ...]:
        """Everything before the last assistant turn."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The content of the last turn, which is the assistant's; of a plain text, all of it."""
        return self.messages[-1].content

    @property
    def is_text(self) -> bool:
        """Whether it is a plain text, or a part of one, and no conversation."""
        return self.messages[-1].role in ("document", "part")
