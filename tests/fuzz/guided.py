"""Fuzz the readers guided by their coverage: python tests/fuzz/guided.py [-atheris_runs=100000] [CORPUS_FOLDER]

Not part of the tests: atheris (pip install atheris) has wheels for few systems. Any uncaught exception ends it, and
leaves the input in crash-*.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lorasmith.data", "lorasmith.cli.run_file", "yaml", "json"]):
    from lorasmith.cli.run_file import load_run_file
    from lorasmith.data.readers import Position
    from lorasmith.data.reading import read_examples
    from lorasmith.data.receipt import Ledger
    from lorasmith.data.sources import open_source
from lorasmith.errors import LorasmithError

FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
SUFFIXES = (".json", ".jsonl", ".csv", ".yaml")


def try_input(content: bytes) -> None:
    """Read the bytes as the kind of file that their first byte says; receipts add up or cannot be made."""
    file = FOLDER / f"input{SUFFIXES[content[0] % len(SUFFIXES) if content else 0]}"
    file.write_bytes(content[1:])
    try:
        if file.suffix == ".yaml":
            load_run_file(file, environ={})
        else:
            source = open_source(file)
            ledger = Ledger(source.name, [file.name], skips_faults=False)
            used = sum(1 for _ in read_examples(source, "auto", ledger, Position()))
            assert ledger.close().used == used
    except LorasmithError:
        pass


if __name__ == "__main__":
    atheris.Setup(sys.argv, try_input)
    atheris.Fuzz()
