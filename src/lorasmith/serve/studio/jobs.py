"""Slow work as processes of their own, found again by what they leave in the run's folder.

    runs/faq/run.yaml             what to train
    runs/faq/train.log            what the process says
    runs/faq/train.process.json   which process it is

A job outlives the page and the server: whoever reads the folder later finds it, running or not.
"""

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import psutil

from lorasmith.command import find_error, read_end, start_command
from lorasmith.errors import RunError
from lorasmith.files import write_whole

Kind = Literal["train", "report", "merge", "export"]


def start(run_dir: Path, kind: Kind, words: Sequence[str]) -> None:
    """Start ``lorasmith WORDS`` as a process that outlives this one; a training's log goes on, the others begin anew.

    Raises:
        RunError: the job is running already.
    """
    if find(run_dir, kind) is not None:
        raise RunError(f"{run_dir.name}: {kind} is running already. Wait for it, or stop it.")
    environment = {**os.environ, "COLUMNS": "160", "PYTHONUNBUFFERED": "1"}
    process = start_command(words, run_dir / f"{kind}.log", appends=kind == "train", environment=environment)
    # While the server lives it is the parent, and must wait for the process or it stays as a zombie.
    threading.Thread(target=process.wait, daemon=True).start()
    started = psutil.Process(process.pid).create_time()
    note = {"pid": process.pid, "started": started, "words": list(words)}
    write_whole(run_dir / f"{kind}.process.json", json.dumps(note) + "\n")


def find(run_dir: Path, kind: Kind) -> psutil.Process | None:
    """Return the job's process while it runs."""
    try:
        note = json.loads((run_dir / f"{kind}.process.json").read_text("utf-8"))
        process = psutil.Process(int(note["pid"]))
        # A number is given to another process some day; its start tells them apart.
        is_it = process.create_time() == note["started"] and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None
    return process if is_it else None


def stop(run_dir: Path, kind: Kind) -> None:
    """Ask the job to stop: training ends after its step and can be gone on with.

    Raises:
        RunError: it does not run, or was not started here.
    """
    process = find(run_dir, kind)
    if process is None:
        raise RunError(
            f"{run_dir.name}: no process of the studio is at work here. A run that was started in a terminal is "
            "stopped there, with Ctrl-C."
        )
    process.terminate()


def read_log(run_dir: Path, kind: Kind, *, num_lines: int = 14) -> str:
    """Return the last lines of what the job said."""
    return "\n".join(read_end(run_dir / f"{kind}.log")[-num_lines:])


def has_failed(run_dir: Path, kind: Kind) -> bool:
    """Whether the job's last words are an error."""
    return find_error(read_end(run_dir / f"{kind}.log")) is not None
