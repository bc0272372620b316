"""Words whose ids are known need no tokenizer: the same few thousand make up most of any text.

A byte-level BPE tokenizer first cuts a text into pieces by a regular expression, then each piece into tokens by
itself. The expressions below never put the end of one word and the start of the next into one piece:

    text     Write a  list of\\n two things.
    words    "Write" " a  list" " of\\n two" " things."      cut before a lone space between two letters or signs

So the ids of a text are those of its words, in a row, and a word that came before need not be cut again.
tests/data/test_words.py compares with the whole text at once; a tokenizer of another kind is left alone.
"""

import re
from collections.abc import Iterable
from itertools import chain
from typing import Any

from tokenizers import Tokenizer

# Of GPT-2 (written out where it is not ByteLevel's own), Llama 3 and Qwen 2 and later.
_PATTERNS = frozenset(
    {
        r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"""
        r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"""
        r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    }
)
_BORDER = re.compile(r"(?<=\S)(?= \S)")
_LONGEST_WORD = 64  # characters; longer ones rarely come again
_MOST_WORDS = 1_000_000  # about 200 MB


def cuts_at_words(tokenizer: dict[str, Any]) -> bool:
    """Return whether a text's ids are those of its words in a row, by what the tokenizer's JSON says."""
    model, normalizer = tokenizer["model"], tokenizer.get("normalizer")
    return (
        model["type"] == "BPE"
        and not model.get("dropout")
        and (normalizer is None or normalizer["type"] == "NFC")  # composes nothing with a space
        and _cuts_before_spaces(tokenizer.get("pre_tokenizer"))
        and not any(map(_reaches_over_spaces, tokenizer["added_tokens"]))
    )


def _cuts_before_spaces(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return False
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    cuts = False
    for step in steps:
        if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            cuts = cuts or step["use_regex"]
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            if step["pattern"].get("Regex") not in _PATTERNS:
                return False
            cuts = True
        elif step["type"] != "Digits":
            return False
    return cuts


def _reaches_over_spaces(token: dict[str, Any]) -> bool:
    if token["special"]:
        return False  # in contents it is text like any other
    has_space = any(letter.isspace() for letter in token["content"])
    return has_space or token["lstrip"] or token["rstrip"] or token["single_word"]


class WordTable:
    """The ids of every word so far, of a tokenizer that :func:`cuts_at_words`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, list[int]] = {}

    def encode_many(self, texts: Iterable[str]) -> list[list[int]]:
        """Return the ids of each text; all new words go to the tokenizer in one call."""
        in_words = [_BORDER.split(text) for text in texts]
        new = [word for word in set(chain.from_iterable(in_words)) if word not in self._ids]
        encodings = self._tokenizer.encode_batch_fast(new, add_special_tokens=False)
        self._ids |= zip(new, (encoding.ids for encoding in encodings), strict=True)
        results = [list(chain.from_iterable(map(self._ids.__getitem__, words))) for words in in_words]
        for word in new:
            if len(word) > _LONGEST_WORD or len(self._ids) > _MOST_WORDS:
                del self._ids[word]
        return results
