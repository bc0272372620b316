"""Processes that train and are killed, at a chosen one of the things that they do to files."""

import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lorasmith.cli.run_file import load_run_file, train
from lorasmith.engine.forward import PackForward
from lorasmith.engine.settings import EngineSettings
from lorasmith.errors import LorasmithError
from lorasmith.model import adapter
from lorasmith.training import checkpoint
from lorasmith.training.checkpoint import last_checkpoint
from lorasmith.training.job import hold_run
from lorasmith.training.loop import train as steps_of
from lorasmith.training.settings import TrainingSettings
from tests.training.conftest import make_adapted, make_examples

_CHANGES = {"os.mkdir", "os.chmod", "os.rename", "os.remove", "os.rmdir"}
_WRITING = os.O_WRONLY | os.O_RDWR

# (what is done, to which file): "open" is for writing, "save" is safetensors' whole file, "half" a part of it.
Note = Callable[[str, str], None]


def watch_files(note: Note) -> None:
    """Call ``note`` before everything that this process does to files from now on; it cannot be undone."""

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGES:
            note(event, str(arguments[0]))
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
            note("open", str(arguments[0]))

    def fsync(descriptor: int, fsync=os.fsync) -> None:
        note("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def save_file(tensors, file, metadata=None, save=adapter.save_file) -> None:
        note("save", str(file))
        save(tensors, file, metadata=metadata)
        os.truncate(file, os.path.getsize(file) // 2)
        note("half", str(file))
        save(tensors, file, metadata=metadata)

    sys.addaudithook(audit)
    os.fsync = fsync
    adapter.save_file = checkpoint.save_file = save_file


def train_file(run_dir: Path, run_file: Path) -> None:
    """Train, or go on with, ``run_dir`` as ``lorasmith train`` does."""
    for _ in train(load_run_file(run_file, environ={}), run_dir):
        pass


def train_three_steps(run_dir: Path, last_step: int = 3) -> None:
    """Train a tiny model for three steps, or go on with them, and save each; the first is the best."""
    settings = TrainingSettings(
        batch_size=4, epochs=1, learning_rate=0.1, save_every=1, evaluate_every=1, keep_checkpoints=1
    )
    model = make_adapted()
    with hold_run(run_dir):
        resume_from, _ = last_checkpoint(run_dir)
        done = resume_from.step if resume_from else 0
        with patch(
            "lorasmith.training.loop.mean_losses", side_effect=[[1.0], [2.0], [3.0]][done:]
        ) as validation:
            steps = steps_of(
                model,
                make_examples(12),
                settings,
                forward=PackForward(model, EngineSettings()),
                learning_rate=0.1,
                run_dir=run_dir,
                validation=make_examples(1),
                resume_from=resume_from,
                should_stop=lambda: done + validation.call_count + 1 == last_step,  # asked before validation
            )
            assert all(report.checkpoint for report in steps)


def die_at(kill_at: int | str, sender: Connection, work: Callable[..., None], *arguments: Any) -> None:
    """Do ``work`` and be killed before the ``kill_at``-th thing that it does to files (0: never), or to such a file.

    Sends the things done, or the text of the error that ended it.
    """
    done: list[tuple[str, str]] = []

    def note(what: str, file: str) -> None:
        done.append((what, file))
        if len(done) == kill_at or (isinstance(kill_at, str) and kill_at in file):
            os.kill(os.getpid(), signal.SIGKILL)

    watch_files(note)
    try:
        work(*arguments)
    except LorasmithError as error:
        sender.send(f"{type(error).__name__}: {error}")
    else:
        sender.send(done)


make_adapted()  # imports the model's code once, in the server, instead of in each of some hundred processes
