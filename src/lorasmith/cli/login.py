"""``lorasmith login``: huggingface_hub asks for the token, checks it and keeps it; lorasmith does not."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from lorasmith.cli.console import console
from lorasmith.errors import HubError, SettingsError


def command(
    token_file: Annotated[
        Path | None, typer.Option(help="File that holds the token; - reads it from stdin.", allow_dash=True)
    ] = None,
) -> None:
    """Log in to the Hub: by its prompt, by --token-file, or by the environment variable HF_TOKEN.

    There is no option for the token itself: it would stay in the shell's history.
    """
    from huggingface_hub import login, whoami

    from lorasmith.model.hub import hub_faults

    if token_file is None and os.environ.get("HF_TOKEN"):
        console.print("HF_TOKEN is set, so it is used, and nothing is saved.")
    elif token_file is None and not sys.stdin.isatty():
        raise SettingsError("There is no terminal to ask in. Pass --token-file FILE, or set HF_TOKEN.")
    else:
        token = None if token_file is None else _read(token_file)
        with hub_faults("the Hub"):
            try:
                login(token=token, skip_if_logged_in=False)
            except ValueError as fault:
                raise HubError(
                    "The Hub does not take this token. Make one at https://huggingface.co/settings/tokens"
                ) from fault
    with hub_faults("the Hub"):
        console.print(f"Logged in to the Hub as [bold]{escape(whoami()['name'])}[/].")


def _read(file: Path) -> str:
    try:
        token = sys.stdin.read() if str(file) == "-" else file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        raise SettingsError(f"The token file {file} cannot be read: {fault}") from fault
    if not token.strip() or len(token.split()) > 1:
        raise SettingsError(f"{file} does not hold a token: it should be one line, hf_...")
    return token.strip()
