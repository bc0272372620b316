"""``lorasmith train`` in a process of its own: its memory is measured alone, and its end is not ours."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorasmith.cli.run_file import ENVIRONMENT_PREFIX
from lorasmith.cli.train import EXIT_STOPPED
from lorasmith.command import find_error, read_end, start_command
from lorasmith.errors import TrainingError

Metrics = dict[str, Any]  # a line of metrics.jsonl
Watch = Callable[[list[Metrics]], bool]  # gets the newest steps; True: end the training now

# Exit codes of a training that was asked to stop.
_STOPPED = (EXIT_STOPPED, 130, -signal.SIGINT, -signal.SIGTERM)
_SECONDS_BETWEEN_LOOKS = 0.5
_TAIL_BYTES = 1 << 16  # some 200 steps: more than are done between two looks


def train_apart(run_file: Path, run_dir: Path, log: Path, watch: Watch) -> bool:
    """Train ``run_file`` into ``run_dir``, all that is said going to ``log``; whether it came to its end.

    It did not where ``watch`` ended it, or Ctrl-C or SIGTERM did, which are passed on: the step is finished and saved.

    Raises:
        TrainingError: the training failed; with its own words.
    """
    # What the environment sets of a run file is in this one, and would otherwise overrule it.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not (name.startswith(ENVIRONMENT_PREFIX) and "__" in name)
    }
    process = start_command(["train", str(run_file)], log, environment=environment)
    try:
        with _signals_go_to(process):
            while process.poll() is None:
                if watch(read_newest(run_dir / "metrics.jsonl")):
                    return False
                time.sleep(_SECONDS_BETWEEN_LOOKS)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode in _STOPPED:
        return False
    if process.returncode != 0:
        raise TrainingError(f"{_what_went_wrong(log, process.returncode)} (all of it: {log})")
    return True


def read_newest(metrics: Path) -> list[Metrics]:
    """Return the last steps of a metrics.jsonl that is being written; [] while there are none."""
    try:
        with metrics.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    whole = lines[1:-1] if size > _TAIL_BYTES else lines[:-1]
    return [json.loads(line) for line in whole]


@contextmanager
def _signals_go_to(process: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Pass Ctrl-C and SIGTERM on as SIGINT: the first ends the training after its step, a second at once."""

    def pass_on(number: int, frame: Any) -> None:
        process.send_signal(signal.SIGINT)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _what_went_wrong(log: Path, code: int) -> str:
    """Return the error that the training ended with, or what is known of its end."""
    lines = read_end(log)
    if error := find_error(lines):
        return error
    if code == -signal.SIGKILL:
        return "The system ended it, most often for want of memory."
    return lines[-1].strip() if lines else f"It ended with exit code {code}."
