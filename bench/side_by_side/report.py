"""One table on the screen, one JSON file beside it."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from side_by_side.machine import describe_machine, describe_packages


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table whose columns are as wide as they must be; None becomes a dash."""
    texts = [[("-" if cell is None else str(cell)) for cell in row] for row in [head, *rows]]
    widths = [max(len(row[i]) for row in texts) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * w if i == 0 else "-" * (w - 1) + ":") for i, w in enumerate(widths)]
    print("\n".join([line(texts[0]), line(rule), *map(line, texts[1:])]), flush=True)


def write_report(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` with the machine, the versions and the command that made it, files by their names alone."""
    words = [Path(word).name if os.sep in word else word for word in sys.argv[1:]]
    command = ["python", f"bench/{Path(sys.argv[0]).name}", *words]
    whole = {"command": command, "machine": describe_machine(), "packages": describe_packages(), **content}
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(whole, indent=1) + "\n")
    part.replace(path)
    print(f"Written: {path}")


def tell(line: str) -> None:
    """Print a line of progress on the error output, so that the table can be piped."""
    print(line, file=sys.stderr, flush=True)


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def percent(share: float) -> str:
    return f"{share:.0%}"
