"""Where lorasmith keeps what it can make again, and how a file is written so that it is whole or absent."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from lorasmith.errors import DataError


def cache_dir() -> Path:
    """Return the cache folder: the environment variable LORASMITH_CACHE, else ~/.cache/lorasmith."""
    return Path(os.environ.get("LORASMITH_CACHE") or "~/.cache/lorasmith").expanduser()


def write_atomically(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Write a file under another name, flush it to the disk, then give it its name.

    A reader, and the next start after a crash, finds the whole file or none.

    Raises:
        DataError: the folder cannot be written to, or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".part-", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise DataError(
            f"The cache file {path} cannot be written: {error.strerror or error}. "
            "Name a folder with room by data.cache_dir or the environment variable LORASMITH_CACHE."
        ) from error
