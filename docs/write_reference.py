"""Write docs/commands.md and docs/settings.md from the code, or check that they are up to date (--check)."""

import re
import sys
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from lorasmith.cli import main
from lorasmith.cli.run_file import RunFile, section_fields
from lorasmith.model.method_settings import METHODS

DOCS = Path(__file__).parent
NOTE = "<!-- Written by docs/write_reference.py (make docs); do not edit. -->\n\n"


def commands() -> str:
    """Return the help of every command, as the terminal shows it at 100 columns."""
    runner = CliRunner(env={"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"})
    parts = [NOTE + "# Commands\n"]
    for name in ("", *main.COMMANDS):
        sys.argv = ["lorasmith", name, "--help"]  # the list of commands imports none of them
        words = [name, "--help"] if name else ["--help"]
        result = runner.invoke(main.app, words, prog_name="lorasmith")
        if result.exit_code != 0:
            raise SystemExit(f"lorasmith {name} --help failed: {result.output} {result.exception}")
        text = "\n".join(
            line.rstrip() for line in re.sub("\x1b\\[[0-9;]*m", "", result.output).strip("\n").split("\n")
        )
        parts.append(f"## lorasmith {name}".rstrip() + f"\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def settings() -> str:
    """Return every setting of a run file with its default and meaning."""
    parts = [NOTE + "# Settings of a run file\n"]
    parts.append("Override one with `section.key=value` on the command line or `LORASMITH_SECTION__KEY`.\n")
    for section in RunFile.model_fields:
        parts.append(f"## {section}\n")
        if section == "method":
            parts += [_method_table(name, kind) for name, kind in METHODS.items()]
        else:
            parts.append(_table(section_fields(section)))
    return "\n".join(parts)


def _method_table(name: str, kind: Any) -> str:
    fields = {key: field for key, field in kind.model_fields.items() if key != "name"}
    return f"### name: {name}\n\n{kind.__doc__.strip()}\n\n{_table(fields) if fields else ''}"


def _table(fields: dict[str, Any]) -> str:
    lines = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for key, field in fields.items():
        default = "needed" if field.is_required() else f"`{field.default}`"
        meaning = (field.description or "").replace("|", "\\|")
        lines.append(f"| `{key}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def run(check: bool) -> int:
    stale = []
    for name, text in (("commands.md", commands()), ("settings.md", settings())):
        file = DOCS / name
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not check:
                file.write_text(text, encoding="utf-8")
                print(f"wrote docs/{name}")
    if check and stale:
        print(f"docs/{' and docs/'.join(stale)} are not what the code says; write them anew: make docs")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run("--check" in sys.argv[1:]))
