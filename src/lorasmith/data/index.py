"""The index of a tokenised source: for each used row, where its tokens are and where it came from.

One file named by everything that it depends on (cache.py). With it a second start reads no row of the data.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from lorasmith.data.cache import read_arrays, write_arrays
from lorasmith.data.receipt import Receipt


@dataclass(frozen=True, slots=True)
class RowTable:
    """N used examples: two for each row of pairs, of a document each of its pieces.

    ``stored`` is the length in the shard, ``lengths`` the one after the overlong policy.
    """

    shards: np.ndarray  # int32 [N], into RowIndex.shard_keys
    starts: np.ndarray  # int64 [N], into the tokens of the shard
    stored: np.ndarray  # int32 [N], tokens
    lengths: np.ndarray  # int32 [N], tokens
    num_learnt: np.ndarray  # int32 [N], tokens; after the overlong policy
    file_numbers: np.ndarray  # int32 [N], into RowIndex.files
    lines: np.ndarray  # int64 [N], the numbers of place_of
    rejected: np.ndarray  # bool [N], the second of a pair, or labelled false
    goes_on: np.ndarray  # bool [N], with the document of the example before

    def select(self, rows: np.ndarray) -> "RowTable":
        """Return the table of ``rows``: indices, or one bool for each row."""
        return RowTable(*(getattr(self, column.name)[rows] for column in fields(self)))

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True, slots=True)
class RowIndex:
    """What was found out about a source: its used rows, its files, the shards that hold the tokens, its receipt."""

    table: RowTable
    files: tuple[str, ...]
    shard_keys: tuple[str, ...]
    receipt: Receipt


def write_index(path: Path, index: RowIndex) -> None:
    """Write the index, whole or not at all."""
    meta = {"files": index.files, "shard_keys": index.shard_keys, "receipt": index.receipt.to_json()}
    columns = {column.name: getattr(index.table, column.name) for column in fields(RowTable)}
    # A receipt may quote rows with any character: ASCII JSON, as bytes.
    meta_bytes = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    write_arrays(path, {"meta": meta_bytes, **columns})


def read_index(path: Path) -> RowIndex | None:
    """Return the index that was written there, None if none was or it is damaged."""
    arrays = read_arrays(path)
    if arrays is None:
        return None
    meta = json.loads(arrays["meta"].tobytes())
    table = RowTable(*(arrays[column.name] for column in fields(RowTable)))
    receipt = Receipt.from_json(meta["receipt"])
    return RowIndex(table, tuple(meta["files"]), tuple(meta["shard_keys"]), receipt)
