"""Rows -> examples: detect each file's format, sort out what cannot be learnt, find duplicates."""

import itertools
from collections.abc import Iterator

from lorasmith.data.example import Example
from lorasmith.data.formats import FORMATS, Format, RowProblem, detect_format, explain_unknown
from lorasmith.data.readers import BlankLine, Item, Position, Row, RowFault
from lorasmith.data.receipt import Ledger
from lorasmith.data.settings import FormatName
from lorasmith.data.shards import digest_messages
from lorasmith.data.sources import DataFile, Source
from lorasmith.errors import DataError

_ROWS_TO_DETECT = 1000  # rows looked at until one is of a known format


def read_examples(
    source: Source, format_name: FormatName, ledger: Ledger, position: Position
) -> Iterator[tuple[Example, bytes]]:
    """Yield each usable example with the digest of its messages; enter every row in the ledger.

    ``position`` is kept at how much of the source is read. Memory: some 400 bytes a row, to know duplicates.

    Raises:
        DataError: a file holds rows, and none of its first 1,000 is of a known format.
    """
    first_seen: dict[bytes, str] = {}
    first_asked: dict[bytes, str] = {}
    done = 0
    for file in source.files:
        in_file = Position()
        row_format, items = _choose_format(file, format_name, file.rows(in_file))
        for item in items:
            position.done = done + in_file.done
            ledger.read()
            example = _read_item(item, row_format, ledger)
            if example is None:
                continue
            digest = digest_messages(example.messages)
            where = first_seen.setdefault(digest, example.where)
            if where is not example.where:
                ledger.skip("duplicate", example.where, f"the same as {where}")
                continue
            where = first_asked.setdefault(digest_messages(example.question), example.where)
            if where is not example.where:
                ledger.warn(
                    "same question, other answer", f"{example.where}: same question as {where}, other answer"
                )
            ledger.use()
            yield example, digest
        done += in_file.done


def _read_item(item: Item, row_format: Format | None, ledger: Ledger) -> Example | None:
    match item:
        case Row(fields, where):
            assert row_format is not None  # chosen from the rows
            try:
                return Example(row_format.read(fields), where)
            except RowProblem as problem:
                enter = ledger.fail if problem.is_error else ledger.skip
                enter(problem.reason, where, problem.detail)
        case RowFault(reason, where, detail):
            ledger.fail(reason, where, detail)
        case BlankLine(where):
            ledger.skip("blank line", where)
    return None


def _choose_format(
    file: DataFile, format_name: FormatName, items: Iterator[Item]
) -> tuple[Format | None, Iterator[Item]]:
    """Return the file's format (None: it holds no row) and its items from the start."""
    if format_name != "auto":
        return FORMATS[format_name], items
    looked_at: list[Item] = []
    first_row: Row | None = None
    for item in items:
        looked_at.append(item)
        if isinstance(item, Row):
            found = detect_format(item.fields)
            if found:
                return found, itertools.chain(looked_at, items)
            first_row = first_row or item
        if len(looked_at) >= _ROWS_TO_DETECT:
            break
    if first_row:
        raise DataError(
            f"{first_row.where}: the row is of no known format, nor is one after it. "
            f"{explain_unknown(first_row.fields)} Rename the keys; --format names a format that should be "
            "assumed."
        )
    if len(looked_at) >= _ROWS_TO_DETECT:
        faults = [item for item in looked_at if isinstance(item, RowFault)]
        what = (
            f"the first is {faults[0].where}: {faults[0].reason} {faults[0].detail}"
            if faults
            else "all are blank"
        )
        raise DataError(f"{file.name}: none of the first {_ROWS_TO_DETECT} lines is a row; {what}.")
    return None, iter(looked_at)
