"""From a file to tokens that are ready to be packed: the five steps in one call, cached by content.

    read -> messages -> duplicates out -> render, tokenise (worker processes) -> overlong policy -> receipt

The first start of 1,000,000 rows reads and tokenises with all cores; memory holds the rows in flight and some
numbers for each row. The second start finds the index, which is named by the sha256 of the files, the
settings, the recipe and the tokenizer, and reads no row. Tokens stay on the disk, mapped into memory.
"""

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import overload

import numpy as np

from lorasmith.data.cache import cache_dir
from lorasmith.data.example import Example, Message
from lorasmith.data.index import RowIndex, RowTable, read_index, write_index
from lorasmith.data.pieces import Borders, cut_document
from lorasmith.data.prompts import TEXT, PromptRecipe, choose_recipe, special_tokens
from lorasmith.data.readers import Position, place_of, split_place
from lorasmith.data.reading import read_examples
from lorasmith.data.receipt import Ledger, Receipt
from lorasmith.data.settings import DataSettings, PromptSettings, RowKind
from lorasmith.data.shards import open_shard_tokens, read_shard_rows, shard_key, unpack_tokens
from lorasmith.data.sources import Source, open_source
from lorasmith.data.tokens import TokenizedExample, label, tokenizer_json, truncate
from lorasmith.data.workers import Job, ShardWriter, count_cores, write_shards_here, write_shards_in_workers
from lorasmith.errors import DataError, OverlongError, SettingsError
from lorasmith.files import digest

SHARD_ROWS = 5_000
SHARD_CHARS = 8 << 20  # a shard is closed when it holds as many, and what is in flight stays small
ROWS_FOR_WORKERS = 20_000  # below that, starting processes takes longer than it saves
CHARS_FOR_WORKERS = 16 << 20  # the same for long texts
# The receipt's words for rows over max_seq_len, and for those that truncation would leave without an answer.
OVERLONG = "too long"
NO_ROOM = "no room for an answer"
_MAX_LISTED = 1000  # faults in an error's text
_NEEDED: dict[RowKind, str] = {  # what a row must have
    "answers": "A row needs a question and an answer",
    "pairs": "A row needs a question and two answers that differ",
    "labelled": "A row needs a question, an answer and a label",
    "documents": "A text needs more than blanks",
}
CHECK_FLAGS: dict[RowKind, str] = {  # how lorasmith check is told so
    "answers": "",
    "pairs": "--pairs ",
    "labelled": "--labels ",
    "documents": "--text ",
}
_CACHE_VERSION = 4

# (rows tokenised, share of the source that they are): what a progress bar needs
Progress = Callable[[int, float], None]


class TokenizedDataset(Sequence[TokenizedExample]):
    """The used examples of a source, in file order; of pairs, the rejected example behind the chosen one.

    ``lengths`` is int32 [N] in tokens, ``num_learnt`` int32 [N] the learnt ones among them. ``receipt`` is
    of the whole source, also for a subset. ``fingerprint`` is the sha256 of the data, ``kind`` what a row is.
    """

    def __init__(
        self,
        index: RowIndex,
        table: RowTable,
        folder: Path,
        max_seq_len: int,
        fingerprint: str,
        kind: RowKind = "answers",
        text_start: int | None = None,
    ) -> None:
        """``text_start`` is the token that begins every piece of a document, where the tokenizer has one."""
        self._index = index
        self._table = table
        self._folder = folder
        self._max_seq_len = max_seq_len
        self._tokens: dict[int, np.ndarray] = {}  # shards opened so far
        self.receipt = index.receipt
        self.fingerprint = fingerprint
        self.kind: RowKind = kind
        self._text_start = text_start
        self.examples_per_row = _per_row(kind)

    @property
    def lengths(self) -> np.ndarray:
        return self._table.lengths

    @property
    def uncut_lengths(self) -> np.ndarray:
        """int32 [N], tokens before "overlong: truncate" cut the row."""
        return self._table.stored

    @property
    def num_learnt(self) -> np.ndarray:
        return self._table.num_learnt

    @property
    def is_rejected(self) -> np.ndarray:
        """bool [N], the second of a pair, or labelled false."""
        return self._table.rejected

    @property
    def documents(self) -> np.ndarray | None:
        """int64 [N], the document that each piece is of; None where the rows are no plain texts."""
        return np.cumsum(~self._table.goes_on) - 1 if self.kind == "documents" else None

    def where(self, i: int) -> str:
        """Return the place of example ``i``, file:line as a rule."""
        return place_of(self._index.files[self._table.file_numbers[i]], self._table.lines[i])

    def subset(self, indices: Sequence[int] | np.ndarray | slice) -> "TokenizedDataset":
        """Return the examples at ``indices``, in that order; no token is copied."""
        found = copy.copy(self)
        found._table = self._table.select(np.arange(len(self))[indices])
        found.examples_per_row = 1
        return found

    def rows(self, numbers: Sequence[int]) -> "TokenizedDataset":
        """Return the examples of the rows ``numbers``: of pairs, both."""
        per_row = self.examples_per_row
        found = self.subset([i for row in numbers for i in range(row * per_row, (row + 1) * per_row)])
        found.examples_per_row = per_row
        return found

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, i: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, i: slice) -> "TokenizedDataset": ...
    def __getitem__(self, i: int | slice) -> "TokenizedExample | TokenizedDataset":
        if isinstance(i, slice):
            return self.subset(i)
        start, stored = self._table.starts[i], self._table.stored[i]
        shard = int(self._table.shards[i])
        if shard not in self._tokens:
            self._tokens[shard] = open_shard_tokens(self._folder, self._index.shard_keys[shard])
        ids, is_learnt = unpack_tokens(self._tokens[shard][start : start + stored])
        if stored != self._table.lengths[i]:
            cut = truncate(ids, is_learnt, self._max_seq_len)
            assert cut is not None  # rows that cannot be cut are not in the table
            ids, is_learnt = cut
        if self.kind == "documents":  # the first token has nothing to be learnt from; see pieces.py
            is_learnt[0] = False
            ids[0] = ids[0] if self._text_start is None else self._text_start
        return TokenizedExample(ids, label(ids, is_learnt), self.where(i))


def prepare_dataset(
    data: DataSettings,
    prompt: PromptRecipe,
    tokenizer,
    *,
    kind: RowKind = "answers",
    source: str | Path | None = None,
    progress: Progress | None = None,
) -> TokenizedDataset:
    """Read, account for and tokenise ``source`` (default: ``data.train``), or find it all in the cache.

    Raises:
        SettingsError: ``data.overlong`` is set for plain texts, which are cut into pieces.
        DataError: the source cannot be read, rows of it are wrong (all are listed), or no row is left.
        OverlongError: examples are longer than max_seq_len, and the policy is "error".
        MissingExtraError: the source needs a package that is not installed.
    """
    dataset = examine_dataset(data, prompt, tokenizer, kind=kind, source=source, progress=progress)
    raise_faults(dataset.receipt, data, kind)
    return dataset


def raise_faults(receipt: Receipt, data: DataSettings, kind: RowKind = "answers") -> None:
    """Raise the error that lists every fault of a receipt; return if there is none."""
    if not receipt.failed:
        if receipt.rows_read == 0:
            raise DataError(f"{receipt.source} is empty: there is no row in it. Is it the right file?")
        if receipt.used == 0:
            skipped = ", ".join(f"{n} {reason}" for reason, n in receipt.skipped.items())
            raise DataError(
                f"{receipt.source}: no {'text' if kind == 'documents' else 'row'} can be used ({skipped}). "
                f"{_NEEDED[kind]}; lorasmith check {CHECK_FLAGS[kind]}{receipt.source} shows the receipt."
            )
        return
    listed = [f"{where}: {reason}" for where, reason in receipt.faults[:_MAX_LISTED]]
    if len(receipt.faults) > _MAX_LISTED:
        listed.append(f"and {len(receipt.faults) - _MAX_LISTED:,} more")
    is_overlong = OVERLONG in receipt.failed
    ways_out = []
    if len(receipt.failed) > is_overlong:
        ways_out.append(
            "Fix the rows, or pass --on-bad-row skip (data.on_bad_row=skip) to leave them out, counted."
        )
    if is_overlong:
        ways_out.append(
            "For the overlong rows pass --overlong drop (they are left out, counted) or --overlong truncate "
            f"(the end token is kept), or raise --max-seq-len ({data.max_seq_len})."
        )
    counts = f"{receipt.num_failed:,} of {receipt.rows_read:,} rows are wrong"
    error = OverlongError if is_overlong and len(receipt.failed) == 1 else DataError
    raise error("\n".join([f"{receipt.source}: {counts}; nothing was trained.", *listed, *ways_out]))


def examine_dataset(
    data: DataSettings,
    prompt: PromptRecipe,
    tokenizer,
    *,
    kind: RowKind = "answers",
    source: str | Path | None = None,
    progress: Progress | None = None,
) -> TokenizedDataset:
    """Do what :func:`prepare_dataset` does, and leave wrong rows to the caller: they are in the receipt.

    Raises:
        SettingsError: as :func:`prepare_dataset`.
        DataError: the source cannot be read at all.
    """
    if kind == "documents":
        if data.overlong != "error":
            raise SettingsError(
                f"data.overlong is {data.overlong}, and plain texts that are longer than data.max_seq_len are cut into "
                "pieces: nothing is dropped or truncated. Leave data.overlong out."
            )
        prompt, _ = choose_recipe(PromptSettings(recipe=TEXT), tokenizer, kind)
    opened = open_source(source or data.train, split=data.split, kind=kind)
    fingerprint = opened.fingerprint()
    folder = cache_dir(data.cache_dir) / "data"
    writer = ShardWriter(
        folder / "shards",
        prompt.to_json(),
        tokenizer_json(tokenizer),
        special_tokens(tokenizer),
        data.remember_words,
    )
    text_key = digest([_CACHE_VERSION, writer.recipe, writer.tokenizer_json, writer.special_tokens])
    policies = [kind, data.format, data.on_bad_row, data.max_seq_len, data.overlong]
    path = folder / "index" / f"{digest([opened.name, fingerprint, text_key, *policies])}.rows"
    index = read_index(path)
    if index is None or any(read_shard_rows(writer.folder, key) is None for key in index.shard_keys):
        borders = Borders(tokenizer) if kind == "documents" else None
        progress = progress or (lambda rows, share: None)
        index = _make_index(opened, data, kind, writer, text_key, borders, progress)
        write_index(path, index)
    start = tokenizer.convert_tokens_to_ids(prompt.bos_token) if prompt.bos_token else None
    return TokenizedDataset(index, index.table, writer.folder, data.max_seq_len, fingerprint, kind, start)


def _per_row(kind: RowKind) -> int:
    return 2 if kind == "pairs" else 1


def _make_index(
    source: Source,
    data: DataSettings,
    kind: RowKind,
    writer: ShardWriter,
    text_key: str,
    borders: Borders | None,
    progress: Progress,
) -> RowIndex:
    files = tuple(file.name for file in source.files)
    ledger = Ledger(source.name, files, skips_faults=data.on_bad_row == "skip")
    chunks = list(_write_shards(source, data, kind, writer, text_key, ledger, progress))
    table = _tabulate(chunks, _per_row(kind), writer.folder, files, ledger)
    if borders is None:
        table = _apply_overlong_policy(table, chunks, data, _per_row(kind), writer.folder, files, ledger)
    else:
        table = _cut_documents(table, chunks, borders, data.max_seq_len, writer.folder, ledger)
    return RowIndex(table, files, tuple(chunk.key for chunk in chunks), ledger.close())


@dataclass(frozen=True, slots=True)
class _Chunk:
    """The rows of one shard: its name, and where each row came from."""

    key: str
    wheres: tuple[str, ...]
    rejected: tuple[bool, ...]
    goes_on: tuple[bool, ...]
    num_rows_until: int  # of the source's used rows, with this chunk's
    share_until: float


def _write_shards(
    source: Source,
    data: DataSettings,
    kind: RowKind,
    writer: ShardWriter,
    text_key: str,
    ledger: Ledger,
    progress: Progress,
) -> Iterator[_Chunk]:
    """Read the source and have every shard written that is not there yet; yield the chunks in order."""
    chunks: deque[_Chunk] = deque()  # read, and their shards perhaps not yet written

    def missing_jobs() -> Iterator[Job]:
        is_ahead = False  # of what is reported as done
        for chunk, conversations in _read_chunks(source, data, kind, text_key, ledger):
            chunks.append(chunk)
            if read_shard_rows(writer.folder, chunk.key) is None:
                is_ahead = True
                yield Job(chunk.key, conversations)
            elif not is_ahead:
                progress(chunk.num_rows_until, chunk.share_until)

    jobs = missing_jobs()
    first = list(itertools.islice(jobs, ROWS_FOR_WORKERS // SHARD_ROWS))
    jobs = itertools.chain(first, jobs)
    is_little = sum(len(job.conversations) for job in first) < ROWS_FOR_WORKERS
    if is_little and sum(job.num_chars for job in first) < CHARS_FOR_WORKERS:
        written = write_shards_here(writer, jobs)
    else:
        written = write_shards_in_workers(writer, jobs, count_cores())
    for job in written:
        while chunks and (chunk := chunks.popleft()):
            progress(chunk.num_rows_until, chunk.share_until)
            yield chunk
            if chunk.key == job.key:
                break
    yield from chunks  # their shards were there already


def _read_chunks(
    source: Source, data: DataSettings, kind: RowKind, text_key: str, ledger: Ledger
) -> Iterator[tuple[_Chunk, list[tuple[Message, ...]]]]:
    position, size, num_rows = Position(), max(1, source.size), 0
    examples = read_examples(source, data.format, ledger, position, kind)
    goes_on = False
    while chunk := list(_take_shard(examples, kind)):
        num_rows += len(chunk) // _per_row(kind)
        key = shard_key(text_key, [digest for _, digest in chunk])
        wheres = tuple([example.where for example, _ in chunk])
        conversations = [example.messages for example, _ in chunk]
        rejected = tuple([example.is_rejected for example, _ in chunk])
        is_part = [goes_on, *(example.messages[0].role == "part" for example, _ in chunk)]
        goes_on = is_part.pop()
        share = min(1.0, position.done / size)
        yield _Chunk(key, wheres, rejected, tuple(is_part), num_rows, share), conversations


def _take_shard(examples: Iterator[tuple[Example, bytes]], kind: RowKind) -> Iterator[tuple[Example, bytes]]:
    """Yield the examples of the next shard: an even number, so that no pair is torn; of documents so many letters."""
    num_chars = 0
    for example in itertools.islice(examples, SHARD_ROWS):
        yield example
        if kind == "documents":
            num_chars += len(example[0].messages[0].content)
            if num_chars >= SHARD_CHARS:
                return


def _tabulate(
    chunks: Sequence[_Chunk], per_row: int, folder: Path, files: Sequence[str], ledger: Ledger
) -> RowTable:
    """Return the table of all rows that the recipe took; enter the refused ones as faults."""
    file_numbers = {name: number for number, name in enumerate(files)}
    tables = [_empty_table()]
    for number, chunk in enumerate(chunks):
        rows = read_shard_rows(folder, chunk.key)
        assert rows is not None  # the shard was just written
        refused = np.flatnonzero(rows.lengths < 0)
        of_rows = dict(zip((refused // per_row).tolist(), rows.refusals, strict=True))
        for row, refusal in of_rows.items():
            ledger.fail("recipe", chunk.wheres[row * per_row], refusal, was_used=True)
        is_there = rows.lengths >= 0
        taken = is_there.reshape(-1, per_row).all(axis=1).repeat(per_row)  # a pair is taken whole
        lengths = np.where(is_there, rows.lengths, 0)
        places = [split_place(where) for where in chunk.wheres]
        table = RowTable(
            shards=np.full(len(lengths), number, np.int32),
            starts=np.cumsum(lengths, dtype=np.int64) - lengths,
            stored=lengths,
            lengths=lengths,
            num_learnt=rows.num_learnt,
            file_numbers=np.array([file_numbers[name] for name, _ in places], np.int32),
            lines=np.array([line for _, line in places], np.int64),
            rejected=np.array(chunk.rejected, bool),
            goes_on=np.array(chunk.goes_on, bool),
        )
        tables.append(table.select(taken))
    return RowTable(
        *(np.concatenate([getattr(t, column.name) for t in tables]) for column in fields(RowTable))
    )


def _empty_table() -> RowTable:
    narrow, wide = np.zeros(0, np.int32), np.zeros(0, np.int64)
    return RowTable(narrow, wide, narrow, narrow, narrow, narrow, wide, np.zeros(0, bool), np.zeros(0, bool))


def _apply_overlong_policy(
    table: RowTable,
    chunks: Sequence[_Chunk],
    data: DataSettings,
    per_row: int,
    folder: Path,
    files: Sequence[str],
    ledger: Ledger,
) -> RowTable:
    """Take the rows over max_seq_len out of the table, or cut them, and enter them in the ledger."""
    lengths, num_learnt = table.lengths.copy(), table.num_learnt.copy()
    keeps = np.ones(len(table), bool)
    too_long = np.flatnonzero(table.lengths > data.max_seq_len)
    for row in dict.fromkeys((too_long // per_row).tolist()):
        members = slice(row * per_row, (row + 1) * per_row)
        longest = int(table.lengths[members].max())
        where = place_of(files[int(table.file_numbers[members.start])], int(table.lines[members.start]))
        detail = f"{longest} tokens, max_seq_len is {data.max_seq_len}"
        if data.overlong == "truncate":
            cuts = []
            for i in range(members.start, members.stop):
                tokens = open_shard_tokens(folder, chunks[table.shards[i]].key)
                packed = tokens[table.starts[i] : table.starts[i] + table.stored[i]]
                cuts.append(truncate(*unpack_tokens(packed), data.max_seq_len))
            kept = [cut for cut in cuts if cut is not None]
            if len(kept) == per_row:
                lengths[members] = [len(ids) for ids, _ in kept]
                num_learnt[members] = [is_learnt.sum() for _, is_learnt in kept]
                ledger.truncate()
                continue
            ledger.skip(NO_ROOM, where, detail, was_used=True)
        elif data.overlong == "drop":
            ledger.skip(OVERLONG, where, detail, was_used=True)
        else:
            ledger.refuse(OVERLONG, where, detail, was_used=True)
        keeps[members] = False
    return replace(table, lengths=lengths, num_learnt=num_learnt).select(keeps)


def _cut_documents(
    table: RowTable,
    chunks: Sequence[_Chunk],
    borders: Borders,
    max_seq_len: int,
    folder: Path,
    ledger: Ledger,
) -> RowTable:
    """Return a row for each piece of every document."""
    cuts: dict[int, np.ndarray] = {}  # of each row that is too long: int64 [pieces, 2], start and end
    for row in np.flatnonzero(table.stored > max_seq_len).tolist():
        tokens = open_shard_tokens(folder, chunks[table.shards[row]].key)
        ids, _ = unpack_tokens(tokens[table.starts[row] : table.starts[row] + table.stored[row]])
        cuts[row] = np.array(cut_document(ids, borders, max_seq_len))
    counts = np.ones(len(table), int)
    counts[list(cuts)] = [len(cut) for cut in cuts.values()]
    first = np.cumsum(counts) - counts  # of each row, the place of its first piece
    pieces = table.select(np.repeat(np.arange(len(table)), counts))
    starts, lengths = pieces.starts.copy(), pieces.stored.copy()
    for row, cut in cuts.items():
        own = slice(first[row], first[row] + len(cut))
        starts[own] += cut[:, 0]
        lengths[own] = cut[:, 1] - cut[:, 0]
    goes_on = np.ones(len(pieces), bool)
    goes_on[first] = table.goes_on
    ledger.divide(int((goes_on[1:] & ~goes_on[:-1]).sum()), len(pieces))
    return replace(
        pieces, starts=starts, stored=lengths, lengths=lengths, num_learnt=lengths - 1, goes_on=goes_on
    )
