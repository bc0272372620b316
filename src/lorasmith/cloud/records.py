"""What was launched from here: one small file a launch, beside the runs that will come home."""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from lorasmith.cloud.task import Launch
from lorasmith.errors import RunError
from lorasmith.files import write_whole

_FOLDER = ".launches"


@dataclass(frozen=True, slots=True)
class LaunchRecord:
    """A launch as it is found again."""

    name: str
    job: str  # as SkyPilot names the managed job, or the machine that serves
    managed: bool
    bucket: str  # s3://NAME
    launched: str  # ISO 8601, UTC
    base: str | None  # the folder or file of here that was uploaded as the base

    @classmethod
    def of(cls, launch: Launch, base: str | None) -> "LaunchRecord":
        """Return the record of a launch that begins now."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(launch.name, launch.job, launch.is_managed, launch.bucket.url, now, base)


def write_record(root: Path, record: LaunchRecord) -> None:
    """Write ``record`` below ``root``, the folder of runs."""
    folder = root / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{record.name}.json", json.dumps(asdict(record), indent=2) + "\n")


def remove_record(root: Path, name: str) -> None:
    """Forget the launch called ``name``."""
    (root / _FOLDER / f"{name}.json").unlink()


def read_records(root: Path) -> list[LaunchRecord]:
    """Return what was launched from ``root``, the last one first."""
    files = (root / _FOLDER).glob("*.json")
    found = [LaunchRecord(**json.loads(file.read_text(encoding="utf-8"))) for file in files]
    return sorted(found, key=lambda record: record.launched, reverse=True)


def find_record(root: Path, name: str | None) -> LaunchRecord:
    """Return the launch called ``name``, or the only one.

    Raises:
        RunError: there is none of that name, or several to choose from.
    """
    records = read_records(root)
    if name is None and len(records) == 1:
        return records[0]
    for record in records:
        if record.name == name:
            return record
    known = ", ".join(record.name for record in records) or "none"
    said = "Which launch?" if name is None else f"Nothing called {name} was launched from here."
    raise RunError(f"{said} Launches of {root}: {known}. Another folder of runs: --root DIR.")
