r"""Documents longer than max_seq_len -> pieces of it, cut at ends of paragraphs where there are any.

max_seq_len 6; tokens a b . \n\n c d e . f E, where E ends the document:

    a b . \n\n           the first piece; its last paragraph end lies in the second half
    \n\n c d e . f       starts with the token before it, which is read and not learnt
    f E

So every token but a document's very first is learnt once, each with at least one before it. Where the tokenizer begins
every text with a token of its own (<s>), a piece begins with that instead, and the very first token is learnt too.
"""

from collections.abc import Sequence

import numpy as np

# How a newline and a space stand in the names of tokens: of byte-level, of SentencePiece, and of other tokenizers.
_NEWLINES = ("Ċ", "<0x0A>", "\n")
_SPACES = ("Ġ", "▁", " ")

_ANYWHERE, _WORD, _LINE, _PARAGRAPH = range(4)


class Borders:
    """What a token of a vocabulary ends or begins; V tokens."""

    def __init__(self, tokenizer) -> None:
        names: Sequence[str] = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        plain = [_plain(name or "") for name in names]
        self._ends_line = np.array([text.endswith("\n") for text in plain])  # bool [V]
        self._ends_paragraph = np.array([text.endswith("\n\n") for text in plain])  # bool [V]
        self._is_newline = np.array([text == "\n" for text in plain])  # bool [V]
        self._begins_word = np.array([text.startswith(" ") for text in plain])  # bool [V]

    def levels(self, ids: np.ndarray) -> np.ndarray:
        """Return int8 [T]: how good a place to cut is before each token; the highest is the start of a paragraph."""
        levels = np.zeros(len(ids), np.int8)
        before, at = ids[:-1], ids[1:]
        levels[1:][self._begins_word[at]] = _WORD
        levels[1:][self._ends_line[before]] = _LINE
        doubled = np.zeros(len(before), bool)  # a second newline by itself
        doubled[1:] = self._is_newline[before[1:]] & self._ends_line[before[:-1]]
        levels[1:][self._ends_paragraph[before] | doubled] = _PARAGRAPH
        levels[1:][self._is_newline[at]] = _ANYWHERE  # blank lines go with the paragraph before them
        return levels


def cut_document(ids: np.ndarray, borders: Borders, max_seq_len: int) -> list[tuple[int, int]]:
    """Return (start, end) of each piece: at most ``max_seq_len`` tokens, the first of them the one before it."""
    if len(ids) <= max_seq_len:
        return [(0, len(ids))]
    levels = borders.levels(ids)
    pieces, start = [], 0
    while len(ids) - start > max_seq_len:
        low, high = start + max_seq_len // 2, start + max_seq_len
        places = levels[low + 1 : high + 1]
        end = low + 1 + int(np.flatnonzero(places == places.max())[-1])
        pieces.append((start, end))
        start = end - 1
    pieces.append((start, len(ids)))
    return pieces


def _plain(name: str) -> str:
    for newline in _NEWLINES:
        name = name.replace(newline, "\n")
    for space in _SPACES:
        name = name.replace(space, " ")
    return name
