"""The consoles that commands print to: results and progress on one, errors on the other."""

from rich.console import Console

console = Console(highlight=False)
error_console = Console(stderr=True, highlight=False)
