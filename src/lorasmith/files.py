"""Files and folders that appear whole or not at all, whenever the process dies, and that are known again."""

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from lorasmith.errors import StorageError

CHECKSUMS = "SHA256SUMS"

_WHY = {
    errno.ENOSPC: "the disk is full. Free some room",
    errno.EDQUOT: "your quota of the disk is used up. Free some room",
    errno.EROFS: "the disk is mounted read-only. Make it writable",
    errno.EACCES: "you may not write there. Ask for permission",
    errno.EPERM: "you may not write there. Ask for permission",
    errno.ENOTDIR: "a file stands where a folder is needed. Move it",
    errno.EEXIST: "a file stands where a folder is needed. Move it",
    errno.EIO: "the disk reports a fault. Check it",
    errno.EFBIG: "the file is larger than this file system takes. Use another one",
    errno.ENAMETOOLONG: "the name is too long. Take a shorter one",
}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as safetensors' Rust says it


def digest(value: Any) -> str:
    """Return the sha256 of a plain value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Raise a StorageError that names ``path`` and the way out when a write inside the block fails."""
    try:
        yield
    except (OSError, SafetensorError) as fault:
        said = _OS_ERROR.search(str(fault))
        number = fault.errno if isinstance(fault, OSError) else int(said[1]) if said else None
        if number not in _WHY:
            raise
        raise StorageError(path, _WHY[number]) from fault
    except StorageError as fault:  # of a part of it, under a name that nobody knows
        raise StorageError(path, fault.why) from fault


def write_whole(path: Path, content: str | Callable[[IO[bytes]], None]) -> None:
    """Replace ``path`` with a text, or with what a function writes: a reader sees the old file or the new one."""
    with storing(path):
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
        _sync(path.parent)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it becomes ``folder``, on any exception it is removed.

    An existing ``folder`` is kept beside it, as ``.<name>.previous``, until the new one stands. Directories
    cannot be exchanged portably in one move, so a crash between the two renames leaves only that:
    ``recover_folder`` puts it back.
    """
    with storing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        recover_folder(folder)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
        try:
            temporary.chmod(0o755)
            yield temporary
            for path in [*temporary.rglob("*"), temporary]:
                path.chmod(0o755 if path.is_dir() else 0o644)
                _sync(path)
            previous = _previous(folder)
            if folder.exists():
                os.rename(folder, previous)
            os.rename(temporary, folder)
            _sync(folder.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            recover_folder(folder)
            raise
    shutil.rmtree(previous, ignore_errors=True)


def write_checksums(folder: Path) -> None:
    """Write SHA256SUMS over every file below ``folder``; ``sha256sum -c SHA256SUMS`` checks it by hand too."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256_of(folder / name)}  {name}\n" for name in names]
    (folder / CHECKSUMS).write_text("".join(lines), encoding="utf-8", newline="\n")


def find_damage(folder: Path, needed: tuple[str, ...]) -> list[str]:
    """Return what is wrong with a folder that :func:`write_checksums` closed, in words; [] if it is whole.

    ``needed`` are files that SHA256SUMS must name: it may itself be cut short. Files that it does not name
    are nobody's business (a file manager's notes, say).
    """
    try:
        lines = (folder / CHECKSUMS).read_bytes().decode("ascii").split("\n")
    except (OSError, UnicodeDecodeError) as fault:
        return [f"{CHECKSUMS} cannot be read ({getattr(fault, 'strerror', None) or 'not plain text'})"]
    found = [re.fullmatch(r"([0-9a-f]{64})  ([\w./-]+)", line) for line in lines[:-1]]
    sums = {match[2]: match[1] for match in found if match}
    if lines[-1] or len(sums) != len(found) or not sums.keys() >= set(needed):
        return [f"{CHECKSUMS} is damaged"]
    damage = []
    for name, digest in sums.items():
        file = folder / name
        if PurePosixPath(name).is_absolute() or ".." in name.split("/"):
            damage.append(f"{CHECKSUMS} names {name}, outside the folder")
        elif not file.is_file():
            damage.append(f"{name} is missing")
        elif sha256_of(file) != digest:
            damage.append(f"{name} is not as it was written")
    return damage


def sha256_of(file: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def nearest_existing(path: Path) -> Path:
    """Return ``path``, or the nearest folder above it that is there: the disk that it is on, or will be."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def is_locked(lock: Path) -> bool:
    """Say whether another process holds ``lock`` at this moment."""
    if not lock.is_file():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # not ours to write to, as on a read-only disk: nobody trains there through us
        return False


def recover_folder(folder: Path) -> None:
    """Bring back the folder that a crashed ``whole_folder`` had set aside, or remove what it left over."""
    previous = _previous(folder)
    if previous.exists():
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
        else:
            os.rename(previous, folder)


def _previous(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.previous"


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder; its rename is durable enough
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
