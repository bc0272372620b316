"""Run a command on a run folder, keep a copy of the folder in a bucket, and end it when the money is gone.

    python -m lorasmith.cloud.keeper --run DIR --copy DIR --rented-since FILE --budget-seconds N --rank 0 -- COMMAND

This runs on the rented machine. A bucket that is mounted as a folder cannot rename a folder in one move (objects
are copied and deleted one by one), and the run folder lives by that (files.py). So training writes to the local
disk, and what is whole there is copied: a checkpoint's SHA256SUMS last, run.json after everything that it tells of.
A machine that is lost takes at most what was written after the last copy.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lorasmith.cloud.quote import SECONDS_AROUND
from lorasmith.files import CHECKSUMS, find_damage

EXIT_BUDGET_GONE = 4
EXIT_NOT_COPIED = 5
_LAST_TRIES = 60
_SECONDS_TO_SAVE = 120  # from the polite signal, which ends training after its step, to the other one
_TIMED_OUT = 124  # exit code of coreutils' timeout
_SPENT = ".spent"


class Mirror:
    """A run folder and its copy: :meth:`restore` once, then :meth:`update` as often as one likes."""

    def __init__(self, run_dir: Path, copy: Path) -> None:
        self.run_dir, self.copy = run_dir, copy
        # What the copy has: name -> time and size of the file that was copied.
        self._seen: dict[str, Any] = {}

    def restore(self) -> Path | None:
        """Replace the run folder by its copy, without checkpoints that are not whole; None if there is no copy.

        A run that was launched again has a new folder beside the old one: the furthest is taken.
        """
        shutil.rmtree(self.run_dir, ignore_errors=True)
        found = [folder for folder in self.copy.parent.glob("*") if (folder / "run.json").is_file()]
        if not found:
            return None
        source = self.copy if self.copy in found else max(found, key=progress_of)
        shutil.copytree(source, self.run_dir, ignore=shutil.ignore_patterns(_SPENT, "*.part"))
        for checkpoint in self.run_dir.glob("checkpoints/step-*"):
            if find_damage(checkpoint, needed=()):
                shutil.rmtree(checkpoint)
        if source == self.copy:
            self._clear_up()
            self._seen = dict.fromkeys(_files_of(self.copy))
            self._seen |= {name: _stamp(self.run_dir / name) for name in _files_of(self.run_dir)}
        return source

    def update(self) -> list[str]:
        """Copy what is new or has changed, remove what the run folder no longer has; return what failed, in words.

        What fails is tried again by the next call: a bucket that does not answer must not end the training.
        """
        faults = []
        names = _files_of(self.run_dir)
        for name in names:
            try:
                stamp = _stamp(self.run_dir / name)
                if self._seen.get(name) != stamp:
                    self._copy(name)
                    self._seen[name] = stamp
            except FileNotFoundError:
                continue  # training has just replaced or removed it: the next call sees what is there
            except OSError as fault:
                faults.append(f"{name}: {fault.strerror}")
        if not faults:
            for name in self._seen.keys() - set(names):
                (self.copy / name).unlink(missing_ok=True)
                for folder in (self.copy / name).relative_to(self.copy).parents:
                    with contextlib.suppress(OSError):  # it holds something else
                        (self.copy / folder).rmdir()
                del self._seen[name]
        return faults

    def _copy(self, name: str) -> None:
        there = self.copy / name
        part = there.with_name(f".{there.name}.part")
        # Opened before there is a folder for it: training may just have removed it.
        with open(self.run_dir / name, "rb") as source:
            there.parent.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as target:
                shutil.copyfileobj(source, target)
        os.replace(part, there)

    def _clear_up(self) -> None:
        """Remove what a machine left that was lost in the middle of a copy.

        The file will not be copied again where training has removed it meanwhile.
        """
        for folder, _, files in os.walk(self.copy, topdown=False):
            for name in files:
                if name.endswith(".part"):
                    Path(folder, name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # it holds something
                Path(folder).rmdir()


def _files_of(run_dir: Path) -> list[str]:
    """Return the whole files of a run, in the order in which a copy must get them."""
    names = []
    for folder, folders, files in os.walk(run_dir):  # Path.rglob fails where a folder vanishes meanwhile
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [Path(folder, name).relative_to(run_dir).as_posix() for name in files if name[0] != "."]
    return sorted(
        names,
        key=lambda name: (
            name == "run.json",
            not name.startswith("checkpoints/"),
            name.endswith(CHECKSUMS),
            name,
        ),
    )


def _stamp(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_mtime_ns, found.st_size


def progress_of(copy: Path) -> tuple[str, float]:
    """Return what grows with a copy's progress: the name of its last checkpoint, then the time of its record."""
    last = max((folder.name for folder in copy.glob("checkpoints/step-*")), default="")
    return last, (copy / "run.json").stat().st_mtime


class Budget:
    """How long the machines of one launch may be rented, all together; each has a file in the bucket."""

    def __init__(self, seconds: float, ledger: Path, rented_since: float) -> None:
        self.seconds, self.ledger, self.rented_since = seconds, ledger, rented_since

    def write(self) -> None:
        """Note how long this machine has been rented."""
        self.ledger.mkdir(parents=True, exist_ok=True)
        (self.ledger / f"{self.rented_since:.0f}").write_text(f"{time.time() - self.rented_since:.0f}\n")

    def seconds_left(self) -> float:
        """Return what is left, with what booting and clearing up costs counted for every machine."""
        earlier = [file for file in self.ledger.glob("*") if file.name != f"{self.rented_since:.0f}"]
        spent = sum(float(file.read_text() or 0) for file in earlier) + time.time() - self.rented_since
        return self.seconds - spent - SECONDS_AROUND * (len(earlier) + 1)


def keep(mirror: Mirror, budget: Budget | None, rank: int, every: float, command: list[str]) -> int:
    """Return the exit code of ``command``, or EXIT_BUDGET_GONE; the copy is up to date then.

    Of several machines the one of rank 0 has the run folder (training/distributed.py), and it alone its copy.
    """
    is_first = rank == 0
    if is_first:
        print(f"Copy in the bucket: {mirror.restore() or 'none yet'}", flush=True)
    limit = "0"  # none
    if budget is not None:
        left = budget.seconds_left()
        if left <= 0:
            print("The budget (--max-cost) is gone; nothing was started.", flush=True)
            return EXIT_BUDGET_GONE
        print(f"The budget (--max-cost) ends this in {left / 60:,.0f} minutes.", flush=True)
        limit = f"{max(1, left):.0f}"
    # Without a limit too: timeout passes a signal on to every process that the command has started.
    process = subprocess.Popen(["timeout", f"--kill-after={_SECONDS_TO_SAVE}", limit, *command])
    signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    while process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(every)
        if is_first:
            _copy_once(mirror, budget)
    if is_first and not _is_copied(mirror, budget, every):
        print("The last state of the run is not in the bucket.", flush=True)
        return EXIT_NOT_COPIED
    if process.returncode == _TIMED_OUT and budget is not None:
        print("The budget (--max-cost) is gone. What was trained so far is in the bucket.", flush=True)
        return EXIT_BUDGET_GONE
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _is_copied(mirror: Mirror, budget: Budget | None, every: float) -> bool:
    """Copy what the command left; return False if the bucket does not take it, tried again and again."""
    for _ in range(_LAST_TRIES):
        if not _copy_once(mirror, budget):
            return True
        time.sleep(every)
    return False


def _copy_once(mirror: Mirror, budget: Budget | None) -> list[str]:
    faults = mirror.update()
    for fault in faults:
        print(f"Not copied to the bucket yet: {fault}", flush=True)
    if budget is not None:
        with contextlib.suppress(OSError):  # written again in a moment
            budget.write()
    return faults


def main() -> int:
    """Run as the command line above says, and return the exit code."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--copy", type=Path, required=True)
    parser.add_argument("--rented-since", type=Path, required=True)
    parser.add_argument("--budget-seconds", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two copies")
    parser.add_argument("command", nargs="+")
    words = parser.parse_args()
    budget = None
    if words.budget_seconds:
        since = float(words.rented_since.read_text())
        budget = Budget(float(words.budget_seconds), words.copy / _SPENT, since)
    return keep(Mirror(words.run, words.copy), budget, words.rank, words.every, words.command)


if __name__ == "__main__":
    sys.exit(main())
