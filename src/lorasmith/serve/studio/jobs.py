"""Slow work as processes of their own, found again by what they leave in the run's folder.

    runs/faq/run.yaml             what to train
    runs/faq/train.log            what the process says
    runs/faq/train.process.json   which process it is

A job outlives the page and the server: whoever reads the folder later finds it, running or not.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import psutil

from lorasmith.errors import RunError
from lorasmith.files import write_whole

Kind = Literal["train", "report", "merge"]

_COMMAND = "from lorasmith.cli.main import main; main()"
_LOG_BYTES = 8000


def start(run_dir: Path, kind: Kind, words: Sequence[str]) -> None:
    """Start ``lorasmith WORDS`` as a process that outlives this one, its output appended to ``KIND.log``.

    Raises:
        RunError: the job is running already.
    """
    if find(run_dir, kind) is not None:
        raise RunError(f"{run_dir.name}: {kind} is running already. Wait for it, or stop it.")
    command = [sys.executable, "-c", _COMMAND, *words]
    with (run_dir / f"{kind}.log").open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C meant for the server does not reach it
            env={**os.environ, "COLUMNS": "160", "PYTHONUNBUFFERED": "1"},
        )
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
    try:
        with (run_dir / f"{kind}.log").open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_BYTES))
            text = log.read().decode("utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.rstrip().splitlines()[-num_lines:])
