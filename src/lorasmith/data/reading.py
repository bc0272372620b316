"""Rows -> examples: detect each file's format, sort out what cannot be learnt, find duplicates."""

import itertools
from collections.abc import Iterator

from lorasmith.data.documents import Document, document_of
from lorasmith.data.example import Example
from lorasmith.data.formats import FORMATS, Format, RowProblem, detect_format, explain_unknown
from lorasmith.data.readers import BlankLine, Item, Position, Row, RowFault
from lorasmith.data.receipt import Ledger
from lorasmith.data.settings import FormatName, RowKind
from lorasmith.data.shards import digest_messages
from lorasmith.data.sources import DataFile, Source
from lorasmith.errors import DataError

_KINDS: dict[RowKind, str] = {
    "answers": "answers",
    "pairs": "pairs of answers",
    "labelled": "answers with a label",
    "documents": "plain texts",
}
_ROWS_TO_DETECT = 1000  # rows looked at until one is of a known format


def read_examples(
    source: Source,
    format_name: FormatName,
    ledger: Ledger,
    position: Position,
    kind: RowKind = "answers",
) -> Iterator[tuple[Example, bytes]]:
    """Yield each usable example with the digest of its messages; enter every row in the ledger.

    A pair yields two, the chosen one first; a document its parts.

    ``position`` is kept at how much of the source is read. Memory: some 400 bytes a row, to know duplicates.

    Raises:
        DataError: a file holds rows, and none of its first 1,000 is of a known format.
    """
    for note in source.notes:
        ledger.warn("files", note)
    if kind == "documents":
        yield from _read_documents(source, format_name, ledger, position)
        return
    first_seen: dict[bytes, str] = {}
    first_asked: dict[bytes, str] = {}
    first_judged: dict[bytes, tuple[bool, str]] = {}  # rejected or not, and where
    done = 0
    for file in source.files:
        in_file = Position()
        row_format, items = _choose_format(file, format_name, kind, file.rows(in_file))
        for item in items:
            position.done = done + in_file.done
            ledger.read()
            examples = _read_item(item, row_format, ledger)
            if not examples:
                continue
            digests = [digest_messages(example.messages) for example in examples]
            example = examples[0]
            where = first_seen.setdefault(b"".join([*digests, bytes([example.is_rejected])]), example.where)
            if where is not example.where:
                ledger.skip("duplicate", example.where, f"the same as {where}")
                continue
            for judged, digest in zip(examples, digests, strict=True) if kind == "labelled" else ():
                is_rejected, where = first_judged.setdefault(digest, (judged.is_rejected, judged.where))
                if is_rejected != judged.is_rejected:
                    ledger.warn(
                        "labelled both ways", f"{judged.where}: {where} labels the same answer otherwise"
                    )
            if kind == "answers":
                where = first_asked.setdefault(digest_messages(example.question), example.where)
                if where is not example.where:
                    ledger.warn(
                        "same question, other answer",
                        f"{example.where}: same question as {where}, other answer",
                    )
            ledger.use()
            yield from zip(examples, digests, strict=True)
        done += in_file.done


def _read_documents(
    source: Source, format_name: FormatName, ledger: Ledger, position: Position
) -> Iterator[tuple[Example, bytes]]:
    first_seen: dict[bytes, str] = {}
    done = 0
    for file in source.files:
        in_file = Position()
        row_format, items = _choose_format(file, format_name, "documents", file.rows(in_file))
        for item in items:
            ledger.read()
            document = item
            if not isinstance(item, Document):
                examples = _read_item(item, row_format, ledger)
                document = (
                    document_of(examples[0].messages[0].content, examples[0].where) if examples else None
                )
            if not isinstance(document, Document):
                continue
            where = first_seen.setdefault(document.digest, document.where)
            if where is not document.where:
                ledger.skip("duplicate", document.where, f"the same as {where}")
                continue
            ledger.use()
            for part in document.parts(in_file):
                position.done = done + in_file.done
                yield part, digest_messages(part.messages)
        done += in_file.done


def _read_item(item: Item | Document, row_format: Format | None, ledger: Ledger) -> tuple[Example, ...]:
    match item:
        case Row(fields, where):
            assert row_format is not None  # chosen from the rows
            try:
                return row_format.examples(fields, where)
            except RowProblem as problem:
                enter = ledger.fail if problem.is_error else ledger.skip
                enter(problem.reason, where, problem.detail)
        case RowFault(reason, where, detail):
            ledger.fail(reason, where, detail)
        case BlankLine(where):
            ledger.skip("blank line", where)
    return ()


def _choose_format(
    file: DataFile, format_name: FormatName, kind: RowKind, items: Iterator[Item | Document]
) -> tuple[Format | None, Iterator[Item | Document]]:
    """Return the file's format (None: it holds no row) and its items from the start."""
    if format_name != "auto":
        named = FORMATS[format_name]
        if not named.teaches(kind):
            raise DataError(
                f"data.format is {format_name} ({named.title}), and the objective learns from {_KINDS[kind]}. "
                "Leave data.format out, or choose another objective.name."
            )
        return named, items
    looked_at: list[Item | Document] = []
    first_row: Row | None = None
    for item in items:
        looked_at.append(item)
        if isinstance(item, Row):
            found = detect_format(item.fields, kind)
            if found:
                return found, itertools.chain(looked_at, items)
            first_row = first_row or item
        if len(looked_at) >= _ROWS_TO_DETECT:
            break
    if first_row:
        raise DataError(
            f"{first_row.where}: the row is of no known format, nor is one after it. "
            f"{explain_unknown(first_row.fields, kind)}"
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
