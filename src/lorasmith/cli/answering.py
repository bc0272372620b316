"""What ``ask`` and ``chat`` share: who answers (tuned, untuned, both), sampling flags, writing an answer."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.markup import escape

from lorasmith.cli.console import error_console
from lorasmith.errors import RunError, SettingsError
from lorasmith.generation.sampling import SamplingSettings

if TYPE_CHECKING:
    from lorasmith.data.example import Message
    from lorasmith.generation.chat import Chat


def _describe(name: str) -> str:
    field = SamplingSettings.model_fields[name]
    default = field.get_default()
    return f"{field.description}{'' if default in (None, ()) else f' Default: {default}.'}"


Run = Annotated[
    str | None,
    typer.Option(
        help="Run, adapter or merged folder, base model, or OWNER/NAME on the Hub. Default: the newest run in runs/."
    ),
]
Untuned = Annotated[bool, typer.Option("--base", help="Ask the untuned base model, with the same prompt.")]
Compare = Annotated[bool, typer.Option("--compare", help="Ask both, the untuned and the tuned model.")]
BaseModel = Annotated[
    str | None,
    typer.Option(help="Where the base model lies, if it was moved or the adapter does not know it."),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
System = Annotated[str | None, typer.Option(help="System prompt. A run's own trained one is used by itself.")]
OverrideSystem = Annotated[
    bool, typer.Option("--override-system", help="Allow a system prompt that is not the trained one.")
]
Temperature = Annotated[float | None, typer.Option(help=_describe("temperature"))]
TopP = Annotated[float | None, typer.Option(help=_describe("top_p"))]
MaxTokens = Annotated[int | None, typer.Option(help=_describe("max_tokens"))]
Stop = Annotated[list[str] | None, typer.Option(help=_describe("stop") + " May be given several times.")]
Seed = Annotated[int | None, typer.Option(help=_describe("seed"))]


@dataclass(frozen=True)
class Side:
    """One of those who answer. ``label`` stands over its answers when there are two."""

    label: str
    chat: "Chat"


def open_sides(
    run: str | None, *, untuned: bool, compare: bool, base_model: str | None, device: str, dtype: str
) -> tuple[Side, ...]:
    """Open the model that ``run`` names and return who is to answer; what is notable goes to stderr."""
    if untuned and compare:
        raise SettingsError("--base and --compare exclude each other: --compare asks the base as well.")
    source = str(find_newest_run()) if run is None else run
    if run is None:
        note(f"Asking {source}, the newest run; --run names another.")
    from lorasmith.generation.chat import open_chat

    tuned = open_chat(source, device=device, dtype=dtype, base=base_model, tell=note)
    for line in tuned.notes:
        note(line)
    if not untuned and not compare:
        return (Side("tuned", tuned),)
    base = Side("untuned", tuned.base())
    return (base, Side("tuned", tuned)) if compare else (base,)


def find_newest_run(root: Path = Path("runs")) -> Path:
    """Return the newest run under ``root`` that has an adapter."""
    from lorasmith.model.run_record import list_runs

    for run_dir, _ in list_runs(root) if root.is_dir() else ():
        if (run_dir / "adapter").is_dir():
            return run_dir
    raise RunError(
        f"There is no trained run in {root}/ to ask. Train one (lorasmith demo does it in minutes), or name "
        "what to ask: --run FOLDER."
    )


def note(line: str) -> None:
    """Print a line that is not part of an answer."""
    error_console.print(f"[dim]{escape(line)}[/]", soft_wrap=True)


def write_answer(
    chat: "Chat",
    question: "Sequence[Message]",
    out: TextIO,
    *,
    sampling: SamplingSettings,
    system: str | None = None,
    override_system: bool = False,
    is_stopped: Callable[[], bool] = lambda: False,
) -> str:
    """Stream one answer to ``out`` and return its text, as far as it came when ``is_stopped`` turned true."""
    pieces = chat.stream(question, sampling=sampling, system=system, override_system=override_system)
    text, num_tokens, reason = "", 0, None
    for piece in pieces:
        out.write(piece.text if not out.isatty() else make_harmless(piece.text))
        out.flush()
        text, num_tokens, reason = text + piece.text, num_tokens + len(piece.token_ids), piece.finish_reason
        if is_stopped():
            break
    out.write("\n")
    out.flush()
    if reason == "length" and num_tokens == sampling.max_tokens:
        note(f"(cut after {num_tokens} tokens; --max-tokens allows more)")
    elif reason == "length":
        note(f"(cut after {num_tokens} tokens: the model's context is full)")
    elif reason == "stop" and not text.strip():
        note("(the model ended its answer at once)")
    return text


def make_harmless(text: str) -> str:
    """Return ``text`` without control characters, which could move a terminal's cursor or hide text."""
    return "".join(
        letter for letter in text if letter.isprintable() or letter in "\n\t" or not _is_control(letter)
    )


def _is_control(letter: str) -> bool:
    return ord(letter) < 0x20 or 0x7F <= ord(letter) < 0xA0


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C inside the block into a flag that is looked at between tokens; a second one
    raises.

    So an answer never stops in the middle of a forward, and the model is whole for the next question.
    """
    received: list[int] = []

    def take(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = signal.signal(signal.SIGINT, take)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGINT, previous)
