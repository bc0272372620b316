r"""Text files -> documents: a text that is learnt from its first to its last token, however long it is.

    notes.md            one document, the whole file
    {"text": "..."}     one document, a row of a data file
    enwik.txt, 10 GB    one document, read in parts of 262,144 characters that end with a paragraph

A part is an example whose one message is of the role "part"; the last one, "document", ends with the end token.
Lines end at \n; \r\n and \r are read as that.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lorasmith.data.example import Example, Message
from lorasmith.data.readers import Item, Position, Row, RowFault

PART_CHARS = 1 << 18
_BLOCK_CHARS = 1 << 16
# Form feeds and vertical tabs stand in old texts; what is not UTF-8 was decoded to half characters.
_NO_TEXT = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff]")
_BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


@dataclass(frozen=True, slots=True)
class Document:
    """A text that can be learnt, in a file or in memory. ``digest`` is of the text, ``where`` its beginning."""

    where: str
    digest: bytes
    text: str | Path

    def parts(self, position: Position) -> Iterator[Example]:
        """Yield the text in parts of at most 262,144 characters; nothing of it is left out.

        A part of a file is named by the line that it begins with.
        """
        if isinstance(self.text, str):
            text = self.text
            blocks = (text[low : low + PART_CHARS] for low in range(0, len(text), PART_CHARS))
            for part in _in_parts(blocks):
                yield Example((part,), self.where)
            return
        name, line = self.where.rpartition(":")[0], 1
        with _open(self.text) as file:
            for part in _in_parts(iter(lambda: file.read(_BLOCK_CHARS), "")):
                yield Example((part,), f"{name}:{line}")
                line += part.content.count("\n")
        position.done = self.text.stat().st_size


def document_of(text: str, where: str) -> Document:
    """Return a text in memory as a document."""
    return Document(where, hashlib.blake2b(text.encode(), digest_size=16).digest(), text)


def read_text(path: Path, name: str, position: Position) -> Iterator["Item | Document"]:
    """Yield the one document of a text file; an empty one as a row with an empty text, any other file as a fault.

    The file is looked through here and read again when the document's parts are taken: it never stands in memory.
    """
    where, line, is_empty = f"{name}:1", 1, True
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        other = _BYTE_ORDER_MARKS.get(file.read(2))
    if other:
        yield RowFault("not UTF-8", where, f"it is {other}; save it as UTF-8")
        return
    with _open(path) as file:
        while block := file.read(_BLOCK_CHARS):
            if wrong := _NO_TEXT.search(block):
                line += block.count("\n", 0, wrong.start())
                yield _fault(wrong.group(), f"{name}:{line}")
                return
            line += block.count("\n")
            is_empty = is_empty and not block.strip()
            digest.update(block.encode())
    yield Row({"text": ""}, where) if is_empty else Document(where, digest.digest(), path)


TEXT_READERS = {".txt": read_text, ".md": read_text}


def _fault(character: str, where: str) -> RowFault:
    code = ord(character)
    if code >= 0xDC80:
        return RowFault("not UTF-8", where, f"byte {code - 0xDC00:#04x}; save the file as UTF-8")
    if code == 0:
        return RowFault("not a text", where, "it holds zero bytes, as binary files do")
    return RowFault("control character", where, f"U+{code:04X}")


def _open(path: Path) -> IO[str]:
    return path.open(encoding="utf-8-sig", errors="surrogateescape")


def _in_parts(blocks: Iterator[str]) -> Iterator[Message]:
    """Yield the text of ``blocks`` cut at ends of paragraphs, else of lines, else of words, else anywhere."""
    rest = ""
    for block in blocks:
        rest += block
        while len(rest) > PART_CHARS:
            end = _place_to_cut(rest)
            yield Message("part", rest[:end])
            rest = rest[end:]
    yield Message("document", rest)


def _place_to_cut(text: str) -> int:
    low = PART_CHARS // 2
    for border, length in (("\n\n", 2), ("\n", 1), (" ", 0)):  # a space goes with the word after it
        found = text.rfind(border, low, PART_CHARS)
        if found >= 0:
            return found + length
    return PART_CHARS
