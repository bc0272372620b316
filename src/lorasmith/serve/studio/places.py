"""The two folders that a name in the page may point into, and no other."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from lorasmith.data.readers import READERS
from lorasmith.errors import DataError, RunError
from lorasmith.files import sha256_of


@dataclass(frozen=True, slots=True)
class Places:
    """Where runs are and where uploaded files go. Names from the page are looked up here, never used as paths."""

    runs: Path
    uploads: Path

    def run(self, name: str) -> Path:
        """Return the folder of the run called ``name``; it need not be there yet.

        Raises:
            RunError: the name is empty, or points out of the folder of runs.
        """
        folder = _below(self.runs, name)
        if folder is None:
            raise RunError(f"{name!r} is no name of a run in {self.runs}. Choose one from the list.")
        return folder

    def upload(self, name: str) -> Path:
        """Return the uploaded file called ``name``.

        Raises:
            DataError: there is none.
        """
        file = _below(self.uploads, name)
        if file is None or not file.is_file():
            raise DataError(f"There is no uploaded file {name!r}. Drop it into the tab Data first.")
        return file

    def list_uploads(self) -> list[str]:
        """Return the names of the uploaded data files, the newest first."""
        files = [file for file in self.uploads.glob("*") if file.is_file() and not file.name.startswith(".")]
        return [file.name for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)]

    def keep_upload(self, file: Path) -> str:
        """Copy ``file`` to the uploads under a plain name of its own and return that name.

        The same content under the same name is kept once; other content gets a number.

        Raises:
            DataError: it is no kind of file that is read as data.
        """
        if file.suffix.lower() not in READERS:
            raise DataError(f"{file.name} is no data file. Data comes as {', '.join(READERS)}.")
        self.uploads.mkdir(parents=True, exist_ok=True)
        stem = re.sub(r"[^\w.-]+", "-", file.stem).strip("-.") or "data"
        number = 1
        while True:
            name = f"{stem}{'' if number == 1 else f'-{number}'}{file.suffix.lower()}"
            there = self.uploads / name
            if not there.exists():
                shutil.copyfile(file, there)
                return name
            if sha256_of(there) == sha256_of(file):
                return name
            number += 1


def _below(root: Path, name: str) -> Path | None:
    """Return ``root / name`` with links followed, if that is below ``root``."""
    place = (root / name).resolve()
    return place if place != root.resolve() and place.is_relative_to(root.resolve()) else None
