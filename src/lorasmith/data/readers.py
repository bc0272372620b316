"""One reader for each kind of data file: bytes -> rows, each with its place: file:line.

JSON is read by hand, row by row, because the receipt needs the line of every row, because one bad row must
not hide the next, and because a million rows must not stand in memory at once.
"""

import codecs
import csv
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from lorasmith.errors import DataError, MissingExtraError

_BLOCK_BYTES = 1 << 20
_MAX_ROW_CHARS = 16 << 20  # a row that cannot be parsed and is longer than this is wrong, not unfinished
_SPACE = re.compile(r"[ \t\r\n]*")
_NEXT_ROW = re.compile(r"\}\s*,\s*(?=\{)")
_UNDECODED = re.compile("[\udc80-\udcff]")  # what the decoder leaves in place of bytes that are not UTF-8


@dataclass(frozen=True, slots=True)
class Row:
    """One parsed row. ``where`` is its place: see :func:`place_of`."""

    fields: dict[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class RowFault:
    """A row that is an error. ``reason`` is one of few words, to be counted; ``detail`` says more."""

    reason: str
    where: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class BlankLine:
    """A line without a row, counted as skipped."""

    where: str


Item = Row | RowFault | BlankLine


@dataclass(slots=True)
class Position:
    """How far a reader has come, for the progress bar: bytes of a file, rows of a Parquet file or Hub split."""

    done: int = 0


def place_of(name: str, number: int) -> str:
    """Return file:line; of a Parquet file or a Hub split name:row, from 1.

    A negative ``number`` is a row of a file whose lines hold several: "file row 7".
    """
    return f"{name}:{number}" if number >= 0 else f"{name} row {-number}"


def split_place(where: str) -> tuple[str, int]:
    """Return the name and the number from which :func:`place_of` made ``where``."""
    name, _, line = where.rpartition(":")
    if line.isdecimal():
        return name, int(line)
    name, _, row = where.rpartition(" row ")
    return name, -int(row)


class _NotFiniteError(ValueError):
    pass


def _refuse_constant(name: str) -> None:
    raise _NotFiniteError(f"{name} is not a JSON value")


_strict = json.JSONDecoder(parse_constant=_refuse_constant)
_lenient = json.JSONDecoder(parse_constant=lambda name: None)


def read_jsonl(path: Path, name: str, position: Position) -> Iterator[Item]:
    r"""Yield the rows of a file with one JSON object on each line. Lines end at \n only."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            position.done += len(line)
            where = f"{name}:{number}"
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            line = line.strip(b" \t\r\n")
            if not line:
                yield BlankLine(where)
                continue
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                yield RowFault(
                    "not UTF-8", where, f"byte {line[error.start]:#04x} at column {error.start + 1}"
                )
                continue
            yield _parse_line(text, where)


def _parse_line(text: str, where: str) -> Item:
    try:
        value, end = _strict.raw_decode(text)
    except (ValueError, RecursionError) as error:
        return _json_fault(error, where)
    if end == len(text):
        return _row(value, where)
    if _SPACE.sub("", text[end:], count=1)[:1] in ("{", "["):
        return RowFault("two objects on a line", where, f"the second starts at column {end + 1}")
    return RowFault("not JSON", where, f"text after the object, at column {end + 1}")


def read_json(path: Path, name: str, position: Position) -> Iterator[Item]:
    """Yield the rows of a JSON list of objects; of a .json file that is JSON lines inside, its lines."""
    with path.open("rb") as file:
        window = _Window(file, position)
        first = window.peek()
        if first == "{":
            if not _is_whole(path):
                yield RowFault(
                    "not a list of rows",
                    f"{name}:{window.line}",
                    "the file is one object; rows stand in a list: [{...}, {...}], or one on each line (.jsonl)",
                )
                return
            position.done = 0
            yield from read_jsonl(path, name, position)
            return
        if first != "[":
            if first:
                yield RowFault(
                    "not JSON", f"{name}:{window.line}", f"a list of rows starts with [, not {first!r}"
                )
            return
        window.advance(1)
        yield from _told_apart(_read_list(window, name), name)


def _told_apart(items: Iterator[Item], name: str) -> Iterator[Item]:
    """Yield ``items``, by the number of the row where the first two are of one line, as in a file of a single line."""
    first = list(itertools.islice(items, 2))
    is_by_row = len(first) == 2 and first[0].where == first[1].where
    for number, item in enumerate(itertools.chain(first, items), start=1):
        yield replace(item, where=place_of(name, -number)) if is_by_row else item


def _is_whole(path: Path) -> bool:
    """Say whether the first line that is not blank is an object by itself."""
    with path.open("rb") as file:
        first = next((line for line in file if line.strip(b"\xef\xbb\xbf \t\r\n")), b"")
    try:
        json.loads(first.decode("utf-8-sig", errors="replace"))
    except (ValueError, RecursionError):
        return False
    return True


def _read_list(window: "_Window", name: str) -> Iterator[Item]:
    expects_row = False  # after a comma
    while (start := window.peek()) != "]" or expects_row:
        where = f"{name}:{window.line}"
        if not start:
            yield RowFault("not JSON", where, "the file ends before the list is closed with ]")
            return
        try:
            value, end, reason = window.decode()
        except (ValueError, RecursionError) as error:
            yield _json_fault(error, where)
            if not window.skip_to_next_row(getattr(error, "pos", window.at)):
                return
            expects_row = True
            continue
        yield RowFault(reason, where) if reason else _row(value, where)
        window.advance(end - window.at)
        after = window.peek()
        expects_row = after == ","
        if expects_row:
            window.advance(1)
        elif after and after != "]":
            yield RowFault("not JSON", f"{name}:{window.line}", f"a comma is missing before {after!r}")
            if not window.skip_to_next_row(window.at):
                return
    window.advance(1)
    if rest := window.peek():
        yield RowFault("not JSON", f"{name}:{window.line}", f"text after the end of the list: {rest!r}")


class _Window:
    """The part of a JSON file around the row that is being parsed; grows at its end, is freed at its start."""

    def __init__(self, file: BinaryIO, position: Position) -> None:
        self.text = ""
        self.at = 0
        self.line = 1
        self._file = file
        self._position = position
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._is_complete = False
        self._has_bad_bytes = False

    def peek(self) -> str:
        """Skip white space and return the character that follows, "" at the end of the file."""
        while True:
            match = _SPACE.match(self.text, self.at)
            assert match is not None  # the pattern matches the empty string
            self.advance(match.end() - self.at)
            if self.at < len(self.text) or not self._grow():
                return self.text[self.at : self.at + 1]

    def advance(self, num_chars: int) -> None:
        self.line += self.text.count("\n", self.at, self.at + num_chars)
        self.at += num_chars

    def decode(self) -> tuple[Any, int, str]:
        """Parse the value that starts here; return it, where it ends, and why it is an error ("": it is none).

        Raises:
            ValueError: it is not JSON; a JSONDecodeError has the place in ``pos``.
        """
        decoder, reason = _strict, ""
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
                break
            except _NotFiniteError:
                decoder, reason = _lenient, "NaN or Infinity"  # it remains to find where the row ends
            except json.JSONDecodeError:
                if len(self.text) - self.at > _MAX_ROW_CHARS or not self._grow():
                    raise
        if self._has_bad_bytes and _UNDECODED.search(self.text, self.at, end):
            reason = "not UTF-8"
        return value, end, reason

    def skip_to_next_row(self, start: int) -> bool:
        """Move to the next place from ``start`` on that looks like a row's beginning, "}, {". False: there is none."""
        while True:
            match = _NEXT_ROW.search(self.text, start)
            if match:
                self.advance(match.end() - self.at)
                return True
            # Go on in the next block; "}, {" may lie across the border.
            self.advance(max(start, len(self.text) - 4096) - self.at)
            start = 0
            if not self._grow():
                return False

    def _grow(self) -> bool:
        if self._is_complete:
            return False
        block = self._file.read(_BLOCK_BYTES)
        self._position.done += len(block)
        self._is_complete = not block
        new = self._decoder.decode(block, final=not block)
        self._has_bad_bytes = self._has_bad_bytes or _UNDECODED.search(new) is not None
        self.text = self.text[self.at :] + new
        self.at = 0
        return True


def _row(value: Any, where: str) -> Row | RowFault:
    if isinstance(value, dict):
        return Row(value, where)
    return RowFault(
        "not an object", where, f"a row is an object with named fields, this is a {type(value).__name__}"
    )


def _json_fault(error: Exception, where: str) -> RowFault:
    if isinstance(error, _NotFiniteError):
        return RowFault("NaN or Infinity", where, str(error))
    if isinstance(error, json.JSONDecodeError):
        if error.msg.startswith("Invalid control character"):
            return RowFault(
                "control character", where, f"at column {error.colno}; write it as \\n, \\t or \\u00.."
            )
        return RowFault("not JSON", where, f"{error.msg} at column {error.colno}")
    return RowFault("not JSON", where, str(error))


def read_csv(path: Path, name: str, position: Position) -> Iterator[Item]:
    """Yield the rows of a CSV file whose first line names the columns."""
    csv.field_size_limit(_MAX_ROW_CHARS)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
        rows = csv.reader(_counted(file, position), strict=True)
        columns: list[str] | None = None
        while True:
            where = f"{name}:{rows.line_num + 1}"
            try:
                cells = next(rows, None)
            except csv.Error as error:
                yield RowFault("not CSV", where, str(error))
                continue
            if cells is None:
                return
            if not any(cell.strip() for cell in cells) and len(cells) < 2:
                yield BlankLine(where)
            elif any(_UNDECODED.search(cell) for cell in cells):
                yield RowFault("not UTF-8", where)
            elif columns is None:
                columns = [cell.strip() for cell in cells]
            elif len(cells) > len(columns):
                detail = f"{len(cells)} cells, the first line names {len(columns)} columns"
                yield RowFault("not CSV", where, detail)
            else:
                yield Row(dict(zip(columns, cells, strict=False)), where)


def _counted(lines, position: Position) -> Iterator[str]:
    for line in lines:
        position.done += len(line)
        yield line


def read_parquet(path: Path, name: str, position: Position) -> Iterator[Item]:
    """Yield the rows of a Parquet file.

    Raises:
        MissingExtraError: pyarrow is not installed.
        DataError: the file is not Parquet, or damaged.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"Reading {name}", "pyarrow", "parquet") from error
    # What is damaged shows where it is met: in the footer, in a page, in a text, in a number.
    faults = (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError)
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except faults as error:
        raise DataError(
            f"{name} is not a Parquet file ({error}). Give a .parquet, .json, .jsonl or .csv file."
        ) from error
    number, size = 0, path.stat().st_size
    with file:
        batches = file.iter_batches(batch_size=1000)
        while True:
            try:
                rows = next(batches).to_pylist()
            except StopIteration:
                return
            except faults as error:
                raise DataError(
                    f"{name} is damaged: after row {number:,} it cannot be read ({error}). Write or copy it again."
                ) from error
            for fields in rows:
                number += 1
                yield Row(fields, f"{name}:{number}")
            position.done = size * number // max(1, file.metadata.num_rows)


READERS: dict[str, Callable[[Path, str, Position], Iterator[Item]]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
