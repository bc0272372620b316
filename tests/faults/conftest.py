"""What the fault tests share: processes that die, disks that are full or read-only, a run file."""

import json
import multiprocessing
import subprocess
from contextlib import contextmanager

import pytest

from .dying import die_at


@pytest.fixture(scope="session")
def processes():
    """A server that has imported everything once: each process is forked from it in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.dying"])
    return context


@pytest.fixture
def run_until(processes):
    """Return a function that does work in a process of its own, killed before its n-th file operation.

    It returns the process's exit code and what it sent: the things done to files, an error's text, or None.
    """

    def run_until(kill_at, work, *arguments):
        receiver, sender = processes.Pipe(duplex=False)
        process = processes.Process(target=die_at, args=(kill_at, sender, work, *arguments))
        process.start()
        sender.close()
        try:
            sent = receiver.recv()
        except EOFError:
            sent = None
        process.join(60)
        return process.exitcode, sent

    return run_until


@pytest.fixture
def run_file(tmp_path, tiny_base_folder):
    """A run of six steps over twelve rows, of the tiny base, saved after every other step."""
    rows = [{"instruction": f"What is number {i}?", "output": f"It is the {i * 7}th."} for i in range(12)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    file = tmp_path / "run.yaml"
    file.write_text(
        f"base: {{model: '{tiny_base_folder}', dtype: float32}}\n"
        f"data: {{train: rows.json, cache_dir: '{tmp_path / 'cache'}'}}\n"
        "method: {r: 4}\n"
        "engine: {threads: 1}\n"
        "training: {batch_size: 4, epochs: 2, learning_rate: 0.01, save_every: 2, micro_batch_tokens: 2048}\n"
    )
    return file


def tree_of(folder):
    """Return every file below ``folder`` with its bytes, but the lock's."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(files)}


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a disk of so many KiB and returns its folder; skips where that is not allowed."""
    mounted = []

    def mount(kib):
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        result = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        if result.returncode:
            pytest.skip(
                f"no file system can be mounted here ({result.stderr.strip()}): it takes root's rights"
            )
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def read_only(disk):
    """Make a mounted disk read-only inside the block: root's rights do not help there, as they do with chmod."""
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
