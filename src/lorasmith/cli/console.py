"""The consoles that commands print to: results and progress on one, errors on the other."""

from rich.console import Console
from rich.markup import escape

console = Console(highlight=False)
error_console = Console(stderr=True, highlight=False)


def tell(line: str) -> None:
    """Print a line that says what is going on, dimmed: it is not what the command was called for."""
    console.print(f"[dim]{escape(line)}[/]", soft_wrap=True)
