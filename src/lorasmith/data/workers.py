"""Write shards in worker processes, one for each core.

A worker is ``python -m lorasmith.data.workers``: it reads pickled jobs from its standard input and answers on
its standard output. It is not a multiprocessing child, because those import the caller's main module again:
that would import torch in every worker, and would run a script twice that has no ``if __name__`` guard. The
pickles pass between a process and its own child; nothing is unpickled that somebody else has written.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from lorasmith.data.example import Message
from lorasmith.data.prompts import PromptRecipe
from lorasmith.data.shards import count_chars, write_shard
from lorasmith.data.tokens import Encoder
from lorasmith.errors import DataError, LorasmithError


@dataclass(frozen=True, slots=True)
class ShardWriter:
    """Everything that turns conversations into a shard; plain values, so that a worker can have it too."""

    folder: Path
    recipe: dict
    tokenizer_json: str
    special_tokens: tuple[str, ...]
    remembers_words: bool


@dataclass(frozen=True, slots=True)
class Job:
    """One shard that is to be written."""

    key: str
    conversations: list[tuple[Message, ...]]

    @property
    def num_chars(self) -> int:
        return count_chars(self.conversations)


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_shards_here(writer: ShardWriter, jobs: Iterable[Job]) -> Iterator[Job]:
    """Write the shards in this process; yield each job when it is done."""
    recipe = PromptRecipe.from_json(writer.recipe)
    encoder = Encoder(writer.tokenizer_json, writer.special_tokens, remembers_words=writer.remembers_words)
    for job in jobs:
        write_shard(writer.folder, job.key, job.conversations, recipe, encoder)
        yield job


def write_shards_in_workers(writer: ShardWriter, jobs: Iterable[Job], num_workers: int) -> Iterator[Job]:
    """Write the shards in ``num_workers`` processes; yield each job when it is done, in the order given.

    At most two jobs for each worker are taken from ``jobs`` ahead of those yielded: memory is bounded.

    Raises:
        DataError: a worker was killed, or its shard cannot be written.
    """
    workers: list[_Worker] = []
    own = threading.local()

    def write(job: Job) -> Job:
        if not hasattr(own, "worker"):
            own.worker = _Worker()
            workers.append(own.worker)
            own.worker.send(writer)
        own.worker.write(job)
        return job

    pending: deque[Future[Job]] = deque()
    threads = ThreadPoolExecutor(num_workers, thread_name_prefix="shard")  # each waits for its own worker
    try:
        for job in jobs:
            pending.append(threads.submit(write, job))
            if len(pending) > 2 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        for worker in tuple(workers):
            worker.stop()  # what is finished is on the disk, the rest is worth nothing
        threads.shutdown()
        for worker in workers:  # those that were just starting have written their shard
            worker.stop()


class _Worker:
    """A child process that is sent a ShardWriter, then writes one shard after another."""

    def __init__(self) -> None:
        # One Rust thread each: the processes already fill the cores.
        environment = {
            **os.environ,
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lorasmith.data.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin, self._process.stdout

    def write(self, job: Job) -> None:
        """Have a shard written.

        Raises:
            DataError: it could not be written, or the process has died.
        """
        self.send(job)
        try:
            fault = pickle.load(self._from)
        except (EOFError, pickle.UnpicklingError) as error:
            raise self._death() from error
        if fault is not None:
            raise DataError(fault)

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._from.close()
        with contextlib.suppress(BrokenPipeError):
            self._to.close()

    def send(self, value: ShardWriter | Job) -> None:
        try:
            pickle.dump(value, self._to, protocol=pickle.HIGHEST_PROTOCOL)
            self._to.flush()
        except BrokenPipeError as error:
            raise self._death() from error

    def _death(self) -> DataError:
        return DataError(
            f"A tokenising process ended with exit code {self._process.wait()} (-9: killed, mostly for want "
            "of memory). Finished shards are kept; start again, on a machine with more free memory if it "
            "was killed."
        )


def _serve(jobs: IO[bytes], answers: IO[bytes]) -> None:
    """Be a worker: write the shards that come, answer None or the text of the error, until the input ends."""
    writer: ShardWriter = pickle.load(jobs)
    received = _received(jobs)
    while True:
        try:
            for _ in write_shards_here(writer, received):
                _answer(answers, None)
            return
        except LorasmithError as error:
            _answer(answers, str(error))
            received = _received(jobs)


def _received(jobs: IO[bytes]) -> Iterator[Job]:
    while True:
        try:
            yield pickle.load(jobs)
        except EOFError:
            return


def _answer(answers: IO[bytes], fault: str | None) -> None:
    pickle.dump(fault, answers)
    answers.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; it ends us by closing our input
    _serve(sys.stdin.buffer, sys.stdout.buffer)
