"""Pieces of the page as HTML; whatever comes from a file, a model or a user is escaped."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]], *, caption: str = "") -> Markup:
    """Return a table that scrolls sideways where it is too wide for the screen."""
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(heading) for heading in headings)
    body = Markup("").join(
        Markup("<tr>{}</tr>").format(Markup("").join(Markup("<td>{}</td>").format(cell) for cell in row))
        for row in rows
    )
    title = Markup("<caption>{}</caption>").format(caption) if caption else ""
    return Markup(
        '<div class="scroll" tabindex="0"><table>{}<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
    ).format(title, head, body)


def fault(error: Exception) -> str:
    """Return an error's text as a box that screen readers read out."""
    return Markup('<div class="fault" role="alert">{}</div>').format(str(error))


def note(text: str) -> Markup:
    """Return a line in small print."""
    return Markup('<p class="soft">{}</p>').format(text)


def log(text: str, *, label: str) -> Markup:
    """Return the end of a process's output."""
    return (
        Markup('<pre class="log" tabindex="0" aria-label="{}">{}</pre>').format(label, text)
        if text
        else Markup("")
    )


def figures(values: Sequence[tuple[str, str]]) -> Markup:
    """Return (name, value) pairs as a row of large numbers."""
    cells = Markup("").join(
        Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(name, value) for name, value in values
    )
    return Markup('<dl class="figures">{}</dl>').format(cells)
