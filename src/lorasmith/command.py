"""A lorasmith command as a process of its own, and the end of what it said."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_END_BYTES = 1 << 14


def start_command(
    words: Sequence[str], log: Path, *, appends: bool = False, environment: Mapping[str, str] | None = None
) -> "subprocess.Popen[bytes]":
    """Start ``lorasmith WORDS``, all that it says going to ``log``.

    A Ctrl-C meant for this process does not reach it.
    """
    with log.open("ab" if appends else "wb") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "lorasmith.cli.main", *words],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def read_end(log: Path) -> list[str]:
    """Return the last lines of what a command said, without empty ones at the end; [] if there is no log."""
    try:
        with log.open("rb") as said:
            said.seek(max(0, said.seek(0, os.SEEK_END) - _END_BYTES))
            return said.read().decode("utf-8", errors="replace").rstrip().splitlines()
    except FileNotFoundError:
        return []


def find_error(lines: Sequence[str]) -> str | None:
    """Return the error that a command ended with, in one line; None if it printed none."""
    for place in reversed(range(len(lines))):
        if lines[place].startswith("Error: "):
            words = [line.strip() for line in lines[place:] if line.strip()]
            return " ".join(words).removeprefix("Error: ")
    return None
