"""Run a process to its end and measure the memory of it and its children."""

import json
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

from side_by_side.workers import worker_environment

_EVERY_SECONDS = 0.1


class MeasuredError(RuntimeError):
    """The process failed; the text has its last words."""


def run_measured(command: Sequence[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Return the JSON of the last line that ``command`` prints, with ``peak_bytes`` and ``wall_seconds``.

    ``peak_bytes`` is the largest sum of resident sets of the process and its children, sampled every 0.1 s. Pages
    of mapped files count in it, although the system can take them back, and shared pages count in each process.

    Raises:
        MeasuredError: it ended with another exit code than 0.
    """
    import psutil

    peak = 0
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=worker_environment() | (environment or {}),
            text=True,
        )

        def sample() -> None:
            nonlocal peak
            parent = psutil.Process(process.pid)
            while process.poll() is None:
                total = 0
                try:
                    members = [parent, *parent.children(recursive=True)]
                except psutil.NoSuchProcess:
                    return
                for member in members:
                    try:
                        total += member.memory_info().rss
                    except psutil.NoSuchProcess:
                        continue
                peak = max(peak, total)
                time.sleep(_EVERY_SECONDS)

        watcher = threading.Thread(target=sample)
        watcher.start()
        output, _ = process.communicate()
        watcher.join()
        wall = time.perf_counter() - started
        if process.returncode:
            errors.seek(0)
            lines = [line for line in errors.read().splitlines() if line.strip()]
            last = lines[-1].strip() if lines else "it printed nothing"
            raise MeasuredError(f"exit code {process.returncode}: {last}")
    return {**json.loads(output.splitlines()[-1]), "peak_bytes": peak, "wall_seconds": wall}
