"""Where lorasmith keeps what it can make again, how it is written there, and how it is known to be whole."""

import hashlib
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from lorasmith.errors import DataError, StorageError
from lorasmith.files import storing, write_whole


def cache_dir(named: str | None = None) -> Path:
    """Return the cache folder: ``named``, else the environment variable LORASMITH_CACHE, else ~/.cache/lorasmith."""
    return Path(named or os.environ.get("LORASMITH_CACHE") or "~/.cache/lorasmith").expanduser()


def write_to_cache(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write a file of the cache: the next start, also after a crash, finds the whole file or none.

    Raises:
        DataError: the folder cannot be written to, or the disk is full.
    """
    try:
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, write)
    except StorageError as error:
        raise DataError(
            f"The cache file {path} cannot be written: {error.why}. "
            "Name a folder with room by data.cache_dir or the environment variable LORASMITH_CACHE."
        ) from error


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to a file of the cache: the sha256 of what follows (32 bytes), then numpy's .npz."""
    content = io.BytesIO()
    np.savez(content, **arrays)  # pyright: ignore[reportArgumentType]
    packed = content.getbuffer()
    write_to_cache(path, lambda file: file.writelines((hashlib.sha256(packed).digest(), packed)))


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Return what :func:`write_arrays` wrote; None if the file is missing or not as it was written."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, packed = content[:32], memoryview(content)[32:]
    if hashlib.sha256(packed).digest() != digest:
        return None
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        return dict(arrays)
