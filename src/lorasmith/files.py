"""Files and folders that appear whole or not at all, whenever the process dies."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from filelock import FileLock, Timeout


def write_whole(path: Path, content: str | Callable[[IO[bytes]], None]) -> None:
    """Replace ``path`` with a text, or with what a function writes: a reader sees the old file or the new one."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), 0o644)  # mkstemp's 0600 would hide a run from colleagues
            if isinstance(content, str):
                file.write(content.encode())
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it becomes ``folder``, on any exception it is removed.

    An existing ``folder`` is kept beside it, as ``.<name>.previous``, until the new one stands. Directories
    cannot be exchanged portably in one move, so a crash between the two renames leaves only that:
    ``recover_folder`` puts it back.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(folder)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
    temporary.chmod(0o755)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o644)
                _sync(file)
        _sync_folder(temporary)
        previous = _previous(folder)
        if folder.exists():
            os.rename(folder, previous)
        os.rename(temporary, folder)
        _sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        recover_folder(folder)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def is_locked(lock: Path) -> bool:
    """Say whether another process holds ``lock`` at this moment."""
    if not lock.is_file():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True


def recover_folder(folder: Path) -> None:
    """Bring back the folder that a crashed ``whole_folder`` had set aside, or remove what it left over."""
    previous = _previous(folder)
    if previous.exists():
        if folder.exists():
            shutil.rmtree(previous)
        else:
            os.rename(previous, folder)


def _previous(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.previous"


def _sync(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder; its rename is durable enough
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
