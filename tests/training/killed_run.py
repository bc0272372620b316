"""The run that test_kill.py starts in a process of its own and kills: reports each step through a pipe."""

from multiprocessing.connection import Connection

from lorasmith.cli.run_file import load_run_file, train
from lorasmith.errors import RunError


def train_to_the_end(run_file: str, run_dir: str, sender: Connection) -> None:
    """Train, or go on with, ``run_dir`` and send every step that is done."""
    try:
        for report in train(load_run_file(run_file, environ={}), run_dir):
            sender.send(report.step)
    except RunError as error:
        sender.send(type(error).__name__)
        return
    sender.send(-1)
