"""``lorasmith train --processes N``: the same command in N processes of this machine, watched until all have ended.

What torchrun does for one machine, without its tracebacks: the environment variables are the same, and so is all that
stands behind them (training/distributed.py). For restarts, or several machines, use torchrun.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import IO

from rich.markup import escape

from lorasmith.cli.console import error_console
from lorasmith.cli.main import EXIT_WRONG_INPUT

_SECONDS_TO_END = 20  # for the others, once one has failed: each finds that out and says so
_PROGRAM = (sys.executable, "-m", "lorasmith.cli.main")


def run_processes(words: Sequence[str], count: int, program: Sequence[str] = _PROGRAM) -> int:
    """Run ``program`` with ``words`` in ``count`` processes and return the exit code of all as one.

    The first process has the screen. What another one says on stderr is printed if it is the first to fail.
    """
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(count)]
        children: list[subprocess.Popen] = []
        was_stopped = stack.enter_context(_all_end(children))
        for rank in range(count):
            variables = {**shared, "RANK": rank, "LOCAL_RANK": rank}
            environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
            streams = {} if rank == 0 else {"stdout": subprocess.DEVNULL, "stderr": said[rank]}
            children.append(subprocess.Popen([*program, *words], env=environment, **streams))
        failed = _first_failure(children)
        if failed is None:
            return 0
        code = children[failed].returncode
        _wait(children, _SECONDS_TO_END)
        if was_stopped():
            return code if code > 0 else 130
        if children[0].returncode == EXIT_WRONG_INPUT:
            return EXIT_WRONG_INPUT  # it has said what is wrong, and the others would say the same
        if failed > 0:
            _tell_of(failed, code, said[failed])
        elif code < 0:
            error_console.print(f"[bold red]Error:[/] Process 0 was ended by {signal.Signals(-code).name}.")
        return code if code > 0 else 1


def _first_failure(children: Sequence[subprocess.Popen]) -> int | None:
    """Wait until all have ended well, or one has not; return its number."""
    while True:
        codes = [child.poll() for child in children]
        if failed := {rank: code for rank, code in enumerate(codes) if code}:
            return min(failed, key=lambda rank: (failed[rank] > 0, rank))  # who was killed is why others fail
        if None not in codes:
            return None
        time.sleep(0.1)


def _wait(children: Sequence[subprocess.Popen], seconds: float) -> None:
    until = time.monotonic() + seconds
    while any(child.poll() is None for child in children) and time.monotonic() < until:
        time.sleep(0.1)


def _tell_of(rank: int, code: int, said: IO[bytes]) -> None:
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    said.seek(0)
    last = said.read().decode(errors="replace").strip()[-4000:]
    error_console.print(
        f"[bold red]Error:[/] Process {rank} (numbered from 0) {how}; the others were stopped. The last checkpoint is "
        f"kept: start the run again. It said: {escape(last or 'nothing')}",
        soft_wrap=True,
    )


@contextmanager
def _all_end(children: Sequence[subprocess.Popen]) -> Iterator[Callable[[], bool]]:
    """Pass SIGINT and SIGTERM on to ``children`` as a wish to stop after the step, and let none outlive the block.

    Yields whether there was such a wish.
    """
    received: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        received.append(number)
        for child in children:
            child.terminate()

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for child in children:
            child.kill()
            child.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)
