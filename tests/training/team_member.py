"""What the processes of test_distributed.py do: each is one of a team, started in the place of torchrun."""

import os
from multiprocessing.connection import Connection

from lorasmith.cli.run_file import load_run_file, train
from lorasmith.errors import LorasmithError


def train_as(rank: int, count: int, port: int, words: list[str], run_dir: str, sender: Connection) -> None:
    """Train as process ``rank`` of ``count`` of this machine, see :func:`train_and_tell`."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LORASMITH_CACHE": f"{run_dir}-cache",  # what another run has computed must not be found
    }
    train_and_tell(words, run_dir, sender)


def train_and_tell(words: list[str], run_dir: str, sender: Connection) -> None:
    """Train and send every step's loss, then the end or the error's text."""
    try:
        for report in train(load_run_file(None, words, {}), run_dir):
            sender.send((report.step, report.loss, report.validation_loss))
    except LorasmithError as error:
        sender.send(f"{type(error).__name__}: {error}")
        return
    sender.send("end")
