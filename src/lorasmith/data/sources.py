"""Find what the user named: a data file, a folder of them, or a data set on the Hub."""

import difflib
import hashlib
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lorasmith.data.documents import TEXT_READERS, Document
from lorasmith.data.readers import READERS, BlankLine, Item, Position, Row, RowFault
from lorasmith.data.settings import RowKind
from lorasmith.errors import DataError, MissingExtraError, first_line
from lorasmith.files import sha256_of

__all__ = [
    "BlankLine",
    "DataFile",
    "Item",
    "Position",
    "Row",
    "RowFault",
    "Source",
    "open_source",
    "read_rows",
]

_MOST_NAMES = 3  # of files that are not read, in a note
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SUFFIXES = ", ".join(READERS)
_TEXT_SUFFIXES = ", ".join(TEXT_READERS)
_ALL_READERS = {**READERS, **TEXT_READERS}


class DataFile(Protocol):
    """A part of a source whose rows share one format."""

    @property
    def name(self) -> str:
        """What stands before the colon of file:line."""
        ...

    @property
    def size(self) -> int:
        """The value of Position.done when all is read."""
        ...

    def rows(self, position: Position) -> Iterator[Item | Document]: ...

    def digest(self) -> str:
        """Return the sha256 of the content."""
        ...


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A data file on this machine; ``name`` is its path from the folder that was named."""

    path: Path
    name: str

    @property
    def size(self) -> int:
        return self.path.stat().st_size

    def rows(self, position: Position) -> Iterator[Item | Document]:
        try:
            yield from _ALL_READERS[self.path.suffix.lower()](self.path, self.name, position)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}.") from error

    def digest(self) -> str:
        return _digest_file(self.path)


@dataclass(frozen=True, slots=True)
class HubSplit:
    """A split of a data set from the Hub, downloaded; ``name`` is its id."""

    name: str
    dataset: Any  # datasets.Dataset

    @property
    def size(self) -> int:
        return len(self.dataset)

    def rows(self, position: Position) -> Iterator[Item]:
        for number, fields in enumerate(self.dataset, start=1):
            position.done = number
            yield Row(fields, f"{self.name}:{number}")

    def digest(self) -> str:
        paths = [Path(file["filename"]) for file in self.dataset.cache_files]
        # Slices of one data set lie in the same files: train[:100] and train[100:200] are told apart by name.
        parts = [str(self.dataset.split), str(len(self.dataset)), *map(_digest_file, paths)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Source:
    """All files of what the user named, in the order they are read. ``notes`` say what in a folder is not read."""

    name: str
    files: tuple[DataFile, ...]
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def fingerprint(self) -> str:
        """Return a sha256 that changes with any byte or name of the data, not with its place on the disk."""
        parts = [f"{file.name} {file.digest()}" for file in self.files]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def open_source(source: str | Path, *, split: str = "train", kind: RowKind = "answers") -> Source:
    """Find the data that ``source`` names. Of "documents" text files are data too.

    Raises:
        DataError: there is no such file, no data file in the folder, or the Hub has no such data set.
        MissingExtraError: a Hub data set is named, and the package ``datasets`` is not installed.
    """
    try:
        path = Path(source).expanduser()
        path.stat()
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, U+0000 in it, ~nobody
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise DataError(f"{str(source)[:200]!r} cannot be opened: {error}.") from error
    readers = _ALL_READERS if kind == "documents" else READERS
    if path.is_dir():
        return _open_text_folder(path) if kind == "documents" else Source(str(source), _files_of_folder(path))
    if path.exists():
        suffix = path.suffix.lower()
        if suffix in TEXT_READERS and kind != "documents":
            raise DataError(
                f"{source} is a plain text, and this needs rows with an answer ({_SUFFIXES}). objective.name=text "
                "learns a text from its first to its last token; lorasmith check --text looks at it."
            )
        if suffix not in readers:
            raise DataError(
                f"{source} is a {path.suffix or 'file without ending'}; lorasmith reads "
                f"{', '.join(readers)}, a folder of them, or a Hub data set id."
            )
        return Source(str(source), (LocalFile(path, path.name),))
    if _looks_like_path(str(source)):
        raise DataError(f"{source} does not exist. {_nearest(path, readers)}".rstrip())
    return Source(str(source), (_load_from_hub(str(source), split),))


def read_rows(source: str | Path, *, split: str = "train") -> Iterator[Item]:
    """Yield every row of ``source``, every fault and every blank line, in order."""
    for file in open_source(source, split=split).files:
        yield from (item for item in file.rows(Position()) if not isinstance(item, Document))


def _files_of_folder(folder: Path) -> tuple[LocalFile, ...]:
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in READERS
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not paths:
        way_out = ""
        if any(path.suffix.lower() in TEXT_READERS for path in folder.rglob("*")):
            way_out = f" It holds texts ({_TEXT_SUFFIXES}): objective.name=text learns every token of them."
        raise DataError(f"The folder {folder} holds no data file ({_SUFFIXES}).{way_out}")
    return tuple(LocalFile(path, path.relative_to(folder).as_posix()) for path in paths)


def _open_text_folder(folder: Path) -> Source:
    """Return every text and data file of a folder, and notes on what in it is not read."""
    files, left_out = [], defaultdict(list)
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_dir():
            continue
        if any(part.startswith(".") for part in name.parts):
            left_out["hidden"].append(name)
        elif path.exists() and not path.resolve().is_relative_to(folder.resolve()):
            left_out["a link out of the folder"].append(name)
        elif not path.is_file():
            left_out["a link to nothing" if path.is_symlink() else "no file"].append(name)
        elif path.suffix.lower() in _ALL_READERS:
            files.append(LocalFile(path, name.as_posix()))
        else:
            left_out[f"of another kind than {', '.join(_ALL_READERS)}"].append(name)
    notes = tuple(f"not read, {why}: {_count_names(names)}" for why, names in left_out.items())
    if not files:
        found = f" What is there is {'; '.join(notes)}." if notes else ""
        raise DataError(f"The folder {folder} holds no text ({', '.join(_ALL_READERS)}).{found}")
    return Source(str(folder), tuple(files), notes)


def _count_names(names: Sequence[Path]) -> str:
    more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(map(str, names[:_MOST_NAMES])) + more


def _looks_like_path(text: str) -> bool:
    suffix = Path(text).suffix.lower()
    is_file_name = suffix in _ALL_READERS or ("/" not in text and suffix[1:].isalpha())
    return is_file_name or not HUB_ID.fullmatch(text)


def _nearest(path: Path, readers: Collection[str]) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"The folder {folder} does not exist either."
    names = [p.name for p in sorted(folder.iterdir()) if p.suffix.lower() in readers or p.is_dir()]
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if near:
        return f"Did you mean {' or '.join(str(folder / name) for name in near)}?"
    data_files = [name for name in names if Path(name).suffix][:5]
    return f"Data files in {folder}: {', '.join(data_files) or 'none'}."


def _load_from_hub(dataset_id: str, split: str) -> HubSplit:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{dataset_id!r} is no file or folder here, so it is taken for a Hub data set id; reading that",
            "datasets",
            "hub-data",
        ) from error
    try:
        dataset = datasets.load_dataset(dataset_id, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        # By turns: its own errors, ValueError, and OSError (those of httpx and huggingface_hub are).
        raise DataError(
            f"{dataset_id!r} is no file or folder here, and the data set of that name could not be loaded "
            f"from the Hub: {first_line(error)} For a file, give its path with its ending ({_SUFFIXES}); for a Hub "
            f"data set, check the id, the split {split!r} and the network."
        ) from error
    return HubSplit(dataset_id, dataset)


def _digest_file(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
