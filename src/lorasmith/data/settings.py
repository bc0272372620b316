"""What a run file may say about the data and about the prompt: sections ``data`` and ``prompt``."""

from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

FormatName = Literal[
    "auto", "text", "alpaca", "prompt_completion", "messages", "sharegpt", "preference", "labelled"
]
RowKind = Literal["answers", "pairs", "labelled", "documents"]  # what a row teaches: see formats.py
# What one of them is called on the screen.
ROW_WORDS: Mapping[RowKind, str] = {
    "answers": "example",
    "pairs": "pair",
    "labelled": "answer",
    "documents": "piece",
}
BadRowPolicy = Literal["error", "skip"]
OverlongPolicy = Literal["error", "drop", "truncate"]
LearntTurns = Literal["all", "last"]


def in_number(number: int, noun: str) -> str:
    """Return "1 example", "2,000 examples": ``noun`` in the singular or the plural."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


class DataSettings(BaseModel):
    """Which rows are read, and what becomes of those that are wrong or too long."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: str = Field(
        description="data file (.json, .jsonl, .csv, .parquet; for objective.name=text also .txt, .md), folder of "
        "them, or Hub data set id"
    )
    validation: str | None = Field(
        default=None, description="data for the validation loss; same kinds as train"
    )
    format: FormatName = Field(default="auto", description="row format; auto detects it for each file")
    on_bad_row: BadRowPolicy = Field(
        default="error",
        description="rows that are wrong: error (all are listed, nothing is trained) or skip (counted)",
    )
    max_seq_len: int = Field(
        default=512, ge=8, description="longest example, in tokens of prompt and answer together"
    )
    overlong: OverlongPolicy = Field(
        default="error",
        description="examples over max_seq_len: error, drop (counted), or truncate (end token kept); plain texts are "
        "cut into pieces instead",
    )
    split: str = Field(default="train", description="split of a Hub data set")
    remember_words: bool = Field(
        default=True,
        description="look up words that came before instead of cutting them into tokens again; the ids are the same",
    )
    cache_dir: str | None = Field(
        default=None,
        description="folder for tokenised data and what the base said of it; default: LORASMITH_CACHE or "
        "~/.cache/lorasmith",
    )


class PromptSettings(BaseModel):
    """How a conversation is written as text, and which part of it is learnt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str = Field(
        default="auto",
        description="auto (chat where the tokenizer has a chat template, else alpaca; of objective.name=text: else "
        "text), alpaca, chat, text (what is asked is gone on with), or the path of a .jinja file",
    )
    system: str | None = Field(
        default=None, description="system prompt for conversations that have none of their own"
    )
    stop: tuple[str, ...] = Field(default=(), description="extra strings that end an answer")
    learn: LearntTurns = Field(
        default="all", description="assistant turns that are learnt: all, or the last only"
    )
