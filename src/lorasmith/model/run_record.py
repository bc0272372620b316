"""run.json: everything that a later command must know about a run, written beside its adapter."""

import json
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lorasmith.data.settings import RowKind
from lorasmith.errors import RunError
from lorasmith.files import is_locked, write_whole
from lorasmith.model.base import BaseRef

SCHEMA_VERSION = 1
LOCK = ".lock"  # in a run folder: held by the process that trains into it
_RECORDED_LIBRARIES = ("lorasmith", "torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def library_versions() -> dict[str, str]:
    """Return the versions that a run's numbers depend on: Python and the libraries that compute."""
    versions = {"python": platform.python_version()}
    for name in _RECORDED_LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


class RunRecord(BaseModel):
    """One run: what it started from, what it was told, and what came out. Never changed, only rewritten."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = SCHEMA_VERSION
    name: str
    created: str = Field(default_factory=_now, description="ISO 8601, UTC")
    base: BaseRef
    recipe: dict[str, Any] = Field(description="PromptRecipe.to_json()")
    settings: dict[str, Any] = Field(description="the resolved run file")
    data: dict[str, Any] = Field(description="source, fingerprint, num_examples, ...")
    versions: dict[str, str] = Field(default_factory=library_versions)
    processes: int = Field(default=1, description="that computed it, or its last part")
    fit: dict[str, Any] | None = Field(
        default=None, description="how steps are cut to fit into memory; none: not chosen yet"
    )
    result: dict[str, Any] | None = Field(
        default=None, description="final_loss, steps, seconds, ...; none: unfinished"
    )

    @property
    def row_kind(self) -> RowKind:
        """What a row of the data is; runs that are older do not say it, and learnt answers."""
        return self.data.get("kind", "answers")


def write_run_record(run_dir: Path, record: RunRecord) -> None:
    """Write ``record`` as run.json into ``run_dir``; a reader sees the old file or the new one."""
    run_dir.mkdir(parents=True, exist_ok=True)
    write_whole(run_dir / "run.json", record.model_dump_json(indent=2) + "\n")


def read_run_record(run_dir: Path) -> RunRecord:
    """Return the record of a run.

    Raises:
        RunError: the folder is missing, is no run, or its run.json cannot be read by this version.
    """
    file = run_dir / "run.json"
    if not file.is_file():
        raise RunError(f"{run_dir} is {_what_is(run_dir)}. A run folder holds run.json and adapter/.")
    try:
        fields = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError) as fault:
        raise RunError(f"{file} cannot be read: {fault}. Restore it, or train again.") from fault
    if not isinstance(fields, dict) or fields.get("schema_version") != SCHEMA_VERSION:
        found = fields.get("schema_version") if isinstance(fields, dict) else None
        raise RunError(
            f"{file} has schema_version {found}, and this lorasmith reads {SCHEMA_VERSION}. "
            "Use the version of lorasmith that wrote it."
        )
    try:
        return RunRecord.model_validate(fields)
    except ValidationError as fault:
        first = fault.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RunError(f"{file} is damaged: {where}: {first['msg']}. Restore it, or train again.") from fault


def list_runs(root: Path | str = "runs") -> list[tuple[Path, RunRecord | RunError]]:
    """Return every run folder under ``root`` (up to three levels down), newest first.

    A run whose run.json cannot be read is listed with its error, after the others, not left out.

    Raises:
        RunError: there is no folder ``root``.
    """
    root = Path(root)
    if not root.is_dir():
        raise RunError(
            f"There is no folder {root}. Runs are made by lorasmith train; name their folder otherwise."
        )
    runs = [(folder, _read_or_fault(folder)) for folder in _run_folders(root, depth=3)]
    readable = [run for run in runs if isinstance(run[1], RunRecord)]
    broken = [run for run in runs if isinstance(run[1], RunError)]
    return sorted(readable, key=lambda run: run[1].created, reverse=True) + broken  # type: ignore[union-attr]


def how_to_finish(run_dir: Path) -> str:
    """Return the sentence that ends a refusal of an unfinished run: what goes on with it, whatever its name was."""
    return f"Finish it: lorasmith train RUN.yaml --name {run_dir.resolve().name} --resume"


def describe_run(folder: Path, record: RunRecord) -> dict[str, Any]:
    """Return one run as plain values; ``state`` is finished, training, stopped (a checkpoint waits) or started."""
    if record.result is not None:
        state = "finished"
    elif is_locked(folder / LOCK):
        state = "training"
    else:
        checkpoints = folder / "checkpoints"
        state = "stopped" if checkpoints.is_dir() and any(checkpoints.iterdir()) else "started"
    result = record.result or {}
    return {
        "folder": str(folder),
        "name": record.name,
        "base": record.base.id,
        "data": record.data.get("source"),
        "num_examples": record.data.get("num_examples"),
        "final_loss": result.get("final_loss"),
        "validation_loss": result.get("validation_loss"),
        "created": record.created,
        "state": state,
    }


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "run.json").is_file():
        yield folder
    elif depth:
        for child in sorted(folder.iterdir()):
            if child.is_dir() and not child.name.startswith("."):
                yield from _run_folders(child, depth - 1)


def _read_or_fault(folder: Path) -> RunRecord | RunError:
    try:
        return read_run_record(folder)
    except RunError as fault:
        return fault


def _what_is(folder: Path) -> str:
    if not folder.exists():
        return "not there"
    if not folder.is_dir():
        return "a file, not a run folder"
    if (folder / "adapter_config.json").is_file():
        return "an adapter folder without a run.json beside it"
    return "a folder without run.json"
