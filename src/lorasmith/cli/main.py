"""The command line: a name for each command, its module imported when it is called.

``lorasmith --help`` imports no command, so it answers at once; ``lorasmith train --help`` imports one.
"""

import importlib
import logging
import sys
import warnings
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from lorasmith import __version__
from lorasmith.errors import DataError, LorasmithError, SettingsError

# In the order of the road, which is the order of the help.
COMMANDS: dict[str, tuple[str, str]] = {
    "init": ("Write a commented run file and sample data, ready to train.", "Start"),
    "check": ("Read a data file as training will: receipt, statistics, what the model sees.", "Start"),
    "estimate": (
        "Say whether a run fits, how long it takes and what it writes, before it is started.",
        "Start",
    ),
    "train": ("Train an adapter, or all weights, from a run file or from --model and --data.", "The road"),
    "ask": ("Ask one question of a run, an adapter or a merged model.", "The road"),
    "chat": ("Talk with a run, an adapter or a merged model.", "The road"),
    "compare": ("Train several tuning methods on the same data, and say which is best.", "The road"),
    "report": ("Before and after: ask base and tuned model, judge, and make one page of it.", "The road"),
    "evaluate": ("Measure a run, a model folder or an endpoint on questions with known answers.", "The road"),
    "merge": ("Fold an adapter into its base, and prove that the answers stay the same.", "The road"),
    "serve": ("Serve runs behind OpenAI's API, many adapters on one base.", "The road"),
    "export": ("Write a model for llama.cpp and Ollama, as a .gguf file.", "The road"),
    "launch": (
        "Train on a rented machine: a quote first, then SkyPilot; status, logs, down, fetch.",
        "The road",
    ),
    "push": ("Push an adapter, a proven merge or the data of a run to the Hub.", "The road"),
    "login": ("Log in to the Hub; huggingface_hub keeps the token.", "The road"),
    "runs": ("List the runs on this machine.", "Look"),
    "doctor": ("Say what this machine has, what is missing, and what mends it.", "Look"),
    "demo": ("The whole road on the handbook example: check, train, ask, merge, report.", "Start"),
}

EXIT_WRONG_INPUT = 2
EXIT_FAILED = 1


class _CommandsOnDemand(TyperGroup):
    def list_commands(self, ctx: typer.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        text, panel = COMMANDS[cmd_name]
        if _only_lists_commands():
            return TyperCommand(cmd_name, help=text, rich_help_panel=panel)
        module = importlib.import_module(f"lorasmith.cli.{cmd_name}")
        app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
        app.command(cmd_name)(module.command)
        command = get_command(app)
        command.name = cmd_name
        return command


def _only_lists_commands() -> bool:
    """Whether this call prints the list of commands: no command was named."""
    return not any(word in COMMANDS for word in sys.argv[1:])


app = typer.Typer(
    cls=_CommandsOnDemand,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Teach a LLaMA-family model what your team knows. Everything runs on this machine.",
    epilog="Begin with: lorasmith demo, or: lorasmith init my-model",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lorasmith {__version__}")
        raise typer.Exit


@app.callback()
def _lorasmith(
    version: bool = typer.Option(
        False, "--version", help="Print the version.", is_eager=True, callback=_print_version
    ),
) -> None:
    pass


def main() -> None:
    """Run the command line; a LorasmithError is printed as text, without a traceback."""
    # Libraries' notices to their developers, such as transformers' about itself, say nothing to a user.
    warnings.filterwarnings("ignore", category=FutureWarning)
    # On CPUs with AVX512-bf16 bitsandbytes says at every import that it lacks a kernel, which nothing here uses.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        app(prog_name="lorasmith")
    except LorasmithError as error:
        _print_error(str(error))
        sys.exit(EXIT_WRONG_INPUT if isinstance(error, (SettingsError, DataError)) else EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        # The disk is full, a folder may not be written to, a file stands where a folder should.
        _print_error(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        sys.exit(EXIT_FAILED)
    except RuntimeError as error:
        # torch's; importing torch to name it would take seconds.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        _print_error(
            "The device has too little memory for this. Use a smaller training.micro_batch_tokens, "
            "engine.gradient_checkpointing=true, base.dtype=bfloat16, or a smaller base."
        )
        sys.exit(EXIT_FAILED)


def _print_error(text: str) -> None:
    from rich.markup import escape

    from lorasmith.cli.console import error_console

    error_console.print(f"[bold red]Error:[/] {escape(text)}", soft_wrap=True)


if __name__ == "__main__":  # python -m lorasmith.cli.main, as torchrun and rented machines start it
    main()
