"""The way home: a run's copy in the bucket becomes an ordinary run folder, whole or not at all."""

import json
import shutil
import subprocess
import tempfile
from pathlib import Path

from lorasmith.cloud.keeper import progress_of
from lorasmith.cloud.records import LaunchRecord
from lorasmith.errors import CloudError, RunError
from lorasmith.files import find_damage, whole_folder

# Each cloud's own tool, which copies only what is new.
_COPY = {"s3": ("aws", "s3", "sync"), "gs": ("gcloud", "storage", "rsync", "--recursive")}
_INSTALL = {"s3": "pip install awscli", "gs": "https://cloud.google.com/sdk/docs/install"}


def fetch(record: LaunchRecord, root: Path) -> Path:
    """Copy the run of ``record`` to ``root`` and return its folder; a run that is not finished can be gone on with.

    Raises:
        RunError: a folder of that name is there already, or the bucket has nothing of the run yet.
        CloudError: the cloud's tool is missing or fails, or what was trained is not whole there.
    """
    run_dir = root / record.name
    if run_dir.exists():
        raise RunError(f"{run_dir} is there already. Move it away, or fetch into another folder: --root DIR.")
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix=".fetching-") as folder:
        _download(f"{record.bucket}/{record.name}", Path(folder))
        found = [copy for copy in Path(folder).iterdir() if (copy / "run.json").is_file()]
        if not found:
            raise RunError(f"{record.bucket}/{record.name} has no run yet. See: lorasmith launch status")
        furthest = max(found, key=lambda copy: (_is_finished(copy), *progress_of(copy)))
        _drop_what_is_not_whole(furthest)
        if record.base is not None:
            _name_base(furthest / "run.json", record.base)
        with whole_folder(run_dir) as part:
            shutil.copytree(furthest, part, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
    return run_dir


def _download(url: str, folder: Path) -> None:
    scheme = url.partition("://")[0]
    tool = _COPY[scheme]
    if shutil.which(tool[0]) is None:
        raise CloudError(f"Fetching from {url} needs {tool[0]}, which is not installed: {_INSTALL[scheme]}")
    done = subprocess.run([*tool, url, str(folder)], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise CloudError(f"{' '.join(tool)} {url} failed:\n{done.stderr.strip()}")


def _is_finished(copy: Path) -> bool:
    return json.loads((copy / "run.json").read_text(encoding="utf-8")).get("result") is not None


def _name_base(run_json: Path, base: str) -> None:
    """Let the record name the base where it lies here; its fingerprint still says which weights it must have."""
    record = json.loads(run_json.read_text(encoding="utf-8"))
    record["base"]["id"] = base
    run_json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _drop_what_is_not_whole(copy: Path) -> None:
    for checkpoint in copy.glob("checkpoints/step-*"):
        if find_damage(checkpoint, needed=()):
            shutil.rmtree(checkpoint)
    for trained in (copy / "adapter", copy / "model"):  # of the two a run has one
        damage = find_damage(trained, needed=()) if trained.is_dir() else []
        if damage and _is_finished(copy):
            raise CloudError(
                f"The {trained.name} in the bucket is not whole: {', '.join(damage)}. If the job is still ending, "
                "fetch again in a minute."
            )
        if damage:
            shutil.rmtree(trained)
