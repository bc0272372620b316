"""Tokenised rows on the disk: a shard is the tokens of 5,000 examples, named by what they were made from.

    <key>.npy    int32 [all tokens of the shard]; a token that is not learnt stands as its complement, ~id
    <key>.rows   int32 [rows]: number of tokens (-1: the recipe refused the row), number of learnt tokens;
                 why rows were refused; the sha256 of the .npy file

The .rows file is written last, each of the two under another name first, and each is known by its sha256: a
shard that a crash or a bad disk left damaged is made again.
The key holds every example's text, the recipe and the tokenizer, so a shard is found again after a crash,
after rows were appended to the file, and in another file with the same rows; it is never out of date.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorasmith.data.cache import read_arrays, write_arrays, write_to_cache
from lorasmith.data.example import Example, Message
from lorasmith.data.prompts import PromptRecipe
from lorasmith.data.tokens import Encoder
from lorasmith.errors import RecipeError

# Given to the Rust tokenizer in one call; bounds a worker's memory.
_ENCODE_AT_ONCE = 500  # conversations
_CHARS_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class ShardRows:
    """What is known of a shard's rows, N of them. A length of -1 is a row that the recipe refused."""

    lengths: np.ndarray  # int32 [N], tokens
    num_learnt: np.ndarray  # int32 [N], tokens
    refusals: tuple[str, ...]  # the reasons, in the order of the refused rows


def digest_messages(messages: Sequence[Message]) -> bytes:
    """Return 16 bytes that differ for different conversations."""
    # No text holds U+0000: rows with control characters are refused before.
    text = "\0".join([part for m in messages for part in (m.role, m.content, m.input)])
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def shard_key(prefix: str, digests: Sequence[bytes]) -> str:
    """Return the name of the shard with these conversations; ``prefix`` names the recipe and the tokenizer."""
    return hashlib.sha256(prefix.encode() + b"".join(digests)).hexdigest()


def write_shard(
    folder: Path,
    key: str,
    conversations: Sequence[tuple[Message, ...]],
    recipe: PromptRecipe,
    encoder: Encoder,
) -> None:
    """Render and tokenise conversations, and write them as one shard."""
    pieces: list[np.ndarray] = []
    lengths, num_learnt, refusals = [], [], []
    for some in _take_batches(conversations):
        rendered = []
        for messages in some:
            try:
                rendered.append(recipe.render(Example(messages, where="")))
            except RecipeError as error:
                rendered.append(None)
                refusals.append(str(error))
        encoded = iter(encoder.encode_many([segments for segments in rendered if segments is not None]))
        for segments in rendered:
            if segments is None:
                lengths.append(-1)
                num_learnt.append(0)
                continue
            ids, is_learnt = next(encoded)
            pieces.append(np.where(is_learnt, ids, ~ids))
            lengths.append(len(ids))
            num_learnt.append(int(is_learnt.sum()))
    tokens = np.concatenate(pieces) if pieces else np.zeros(0, np.int32)
    content = io.BytesIO()
    np.save(content, tokens.astype(np.int32, copy=False))
    write_to_cache(_tokens_path(folder, key), lambda file: file.writelines((content.getbuffer(),)))
    rows = {
        "lengths": np.array(lengths, np.int32),
        "num_learnt": np.array(num_learnt, np.int32),
        "refusals": np.array(refusals, np.str_),
        "sha256": np.frombuffer(hashlib.sha256(content.getbuffer()).digest(), np.uint8),
    }
    write_arrays(_rows_path(folder, key), rows)


def count_chars(conversations: Iterable[tuple[Message, ...]]) -> int:
    """Return the characters of all contents."""
    return sum(len(message.content) for messages in conversations for message in messages)


def _take_batches(conversations: Sequence[tuple[Message, ...]]) -> Iterator[list[tuple[Message, ...]]]:
    batch: list[tuple[Message, ...]] = []
    num_chars = 0
    for messages in conversations:
        batch.append(messages)
        num_chars += count_chars([messages])
        if len(batch) == _ENCODE_AT_ONCE or num_chars > _CHARS_AT_ONCE:
            yield batch
            batch, num_chars = [], 0
    yield batch


def read_shard_rows(folder: Path, key: str) -> ShardRows | None:
    """Return what is known of a finished shard's rows; None if it is not finished, or either file is damaged."""
    rows = read_arrays(_rows_path(folder, key))
    if rows is None:
        return None
    try:
        with _tokens_path(folder, key).open("rb") as tokens:
            digest = hashlib.file_digest(tokens, "sha256").digest()
    except OSError:
        return None
    if digest != rows["sha256"].tobytes():
        return None
    return ShardRows(rows["lengths"], rows["num_learnt"], tuple(rows["refusals"].tolist()))


def open_shard_tokens(folder: Path, key: str) -> np.ndarray:
    """Return the shard's tokens, int32, mapped from the disk."""
    mapped = np.load(_tokens_path(folder, key), mmap_mode="r", allow_pickle=False)
    return np.asarray(mapped)  # the plain array over the same pages: slices of a memmap take twice as long


def unpack_tokens(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (input_ids int32 [T], is_learnt bool [T]) from a row as it stands in a shard."""
    is_learnt = packed >= 0
    return np.where(is_learnt, packed, ~packed), is_learnt


def _tokens_path(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}.npy"


def _rows_path(folder: Path, key: str) -> Path:
    return folder / key[:2] / f"{key}.rows"
