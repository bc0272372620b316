"""A contender is a process of its own that keeps its model loaded and does a step when it is told to.

    driver                       worker
    Worker(command)  ------->    loads, then  channel.send({...})       its first answer: it is ready
    worker.ask()     ------->    channel.wait() returns; it does a step; channel.send({...})
    worker.close()   ------->    channel.wait() raises SystemExit

One line of JSON each way. What libraries print goes to the worker's log file.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent.parent


class WorkerDiedError(RuntimeError):
    """A contender ended by itself; the text has its last words and the place of its log."""


class Channel:
    """The worker's end."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # whatever a library prints must not get between the answers

    def send(self, answer: dict[str, Any]) -> None:
        self._out.write(json.dumps(answer) + "\n")

    def wait(self) -> None:
        """Return when the driver asks for the next step; end the process when it closes."""
        if not sys.stdin.readline():
            raise SystemExit(0)


class Worker:
    """The driver's end: start ``command``, log to ``log``; ``ready`` is its first answer."""

    def __init__(
        self, name: str, command: list[str], log: Path, environment: dict[str, str] | None = None
    ) -> None:
        self.name = name
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=worker_environment() | (environment or {}),
            )
        self.ready = self._read()

    def ask(self) -> dict[str, Any]:
        """Let it do a step and return its answer.

        Raises:
            WorkerDiedError: it ended instead.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None
        return self._read()

    def close(self) -> None:
        """Tell it to end and wait until it has."""
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._death()
        return json.loads(line)

    def _death(self) -> WorkerDiedError:
        code = self._process.wait()
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "it printed nothing"
        return WorkerDiedError(f"{self.name} ended with exit code {code}: {last} (log: {self._log})")


def worker_environment() -> dict[str, str]:
    """Return the environment of a worker: offline, and with this package importable."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "warning"}
    return {**os.environ, **offline, "PYTHONPATH": str(BENCH)}


def peer_python(folder: str = ".venv-peers") -> str:
    """Return the interpreter of the peers' environment.

    Raises:
        SystemExit: it has not been made.
    """
    python = BENCH / folder / "bin" / "python"
    if not python.is_file():
        sys.exit(f"There is no {python}: the peers are not installed. Run: sh bench/peers/install.sh")
    return str(python)
