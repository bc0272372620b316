"""Where lorasmith keeps what it can make again, and how it is written there."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO

from lorasmith.errors import DataError, StorageError
from lorasmith.files import write_whole


def cache_dir() -> Path:
    """Return the cache folder: the environment variable LORASMITH_CACHE, else ~/.cache/lorasmith."""
    return Path(os.environ.get("LORASMITH_CACHE") or "~/.cache/lorasmith").expanduser()


def write_to_cache(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write a file of the cache: the next start, also after a crash, finds the whole file or none.

    Raises:
        DataError: the folder cannot be written to, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write)
    except (OSError, StorageError) as error:
        raise DataError(
            f"The cache file {path} cannot be written: {error.__cause__ or error}. "
            "Name a folder with room by data.cache_dir or the environment variable LORASMITH_CACHE."
        ) from error
