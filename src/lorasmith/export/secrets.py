"""Find what should not be published by accident: keys of known services, private keys, e-mail addresses."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorasmith.data.documents import Document
from lorasmith.data.settings import RowKind
from lorasmith.data.sources import Position, Row, open_source
from lorasmith.errors import DataError

_PATTERNS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "an OpenAI or Anthropic key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "an AWS access key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})",
    "a Slack token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a Google API key": r"\bAIza[A-Za-z0-9_-]{35}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a JSON web token": r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]+",
    "an e-mail address": r"\b[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){0,8}\.[A-Za-z]{2,}\b",
}
_ANY = re.compile("|".join(f"(?P<k{i}>{pattern})" for i, pattern in enumerate(_PATTERNS.values())))
_KINDS = tuple(_PATTERNS)
_PLACE = re.compile(r"(?<![\w./~-])(?:/[^\s/:;,'\"()]+){2,}")  # not and/or, no address of the web
_ENOUGH = 100  # findings; who has more knows by then


@dataclass(frozen=True)
class Finding:
    """What was found, where (file:line), and its beginning; a key is never shown whole."""

    kind: str
    where: str
    shown: str

    def __str__(self) -> str:
        return f"{self.where}: {self.kind} ({self.shown})"


def find_in_text(text: str, where: str, first_line: int = 1) -> Iterator[Finding]:
    """Yield what each line of ``text`` holds."""
    for number, line in enumerate(text.split("\n"), start=first_line):
        yield from _find(line, f"{where}:{number}")


def find_in_data(source: str, kind: RowKind = "answers") -> Iterator[Finding]:
    """Yield what the rows or texts of a data source hold; nothing if it can no longer be read."""
    try:
        for file in open_source(source, kind=kind).files:
            for item in file.rows(Position()):
                if isinstance(item, Row):
                    yield from _find(json.dumps(item.fields, ensure_ascii=False, default=str), item.where)
                elif isinstance(item, Document):
                    for part in item.parts(Position()):
                        name, _, line = part.where.rpartition(":")
                        yield from find_in_text(part.messages[0].content, name, first_line=int(line))
    except DataError:
        return


def first_findings(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return the first of them, each text once."""
    kept: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        kept.setdefault((finding.kind, finding.shown), finding)
        if len(kept) == _ENOUGH:
            break
    return tuple(kept.values())


def without_places(value: Any) -> Any:
    """Return JSON values with every absolute path cut to its last part: it tells names of machines and people."""
    if isinstance(value, dict):
        return {key: without_places(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_places(entry) for entry in value]
    if isinstance(value, str) and "\n" not in value and Path(value).is_absolute():
        return Path(value).name
    return value


def cut_places(text: str) -> str:
    """Return a sentence with every absolute path in it cut to its last part."""
    return _PLACE.sub(lambda place: place[0].rpartition("/")[2], text)


def _find(line: str, where: str) -> Iterator[Finding]:
    for match in _ANY.finditer(line):
        kind = _KINDS[int(str(match.lastgroup)[1:])]
        text = match[0]
        yield Finding(kind, where, text if kind == "an e-mail address" else f"{text[:8]}...")
