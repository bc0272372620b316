"""``lorasmith chat``: a conversation in the terminal, streamed, that Ctrl-C does not end by accident."""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from lorasmith.cli import answering
from lorasmith.cli.answering import Side, note, open_sides, stop_on_interrupt, write_answer
from lorasmith.errors import LorasmithError
from lorasmith.generation.sampling import SamplingSettings, parse_sampling

if TYPE_CHECKING:
    from lorasmith.data.example import Message

HELP = """\
/reset   forget the conversation and begin a new one
/help    show this list
/exit    leave (so does Ctrl-D, or Ctrl-C twice)
Ctrl-C   stop an answer; what was said so far stays in the conversation"""


def command(
    run: answering.Run = None,
    base: answering.Untuned = False,
    compare: answering.Compare = False,
    system: answering.System = None,
    override_system: answering.OverrideSystem = False,
    temperature: answering.Temperature = None,
    top_p: answering.TopP = None,
    max_tokens: answering.MaxTokens = None,
    stop: answering.Stop = None,
    seed: answering.Seed = None,
    base_model: answering.BaseModel = None,
    device: answering.Device = "auto",
    dtype: answering.Dtype = "auto",
) -> None:
    """Talk with a model. It remembers the conversation; /help lists what can be said to the program."""
    sampling = parse_sampling(
        temperature=temperature, top_p=top_p, max_tokens=max_tokens, stop=stop, seed=seed
    )
    sides = open_sides(run, untuned=base, compare=compare, base_model=base_model, device=device, dtype=dtype)
    with suppress(ImportError):
        import readline  # noqa: F401  gives input() line editing and a history; Windows has none
    is_interactive = sys.stdin.isatty()
    if is_interactive:
        names = " and ".join(side.chat.name for side in sides)
        note(f"Talking with {names}. /help lists the commands; Ctrl-D leaves.")
    talk(
        sides,
        sampling,
        read_line=lambda: input("> " if is_interactive else ""),
        out=sys.stdout,
        system=system,
        override_system=override_system,
    )


def talk(
    sides: Sequence[Side],
    sampling: SamplingSettings,
    *,
    read_line: Callable[[], str],
    out: TextIO,
    system: str | None = None,
    override_system: bool = False,
) -> None:
    """Read questions and write answers until the user leaves.

    ``read_line`` returns a line, raises EOFError at the end of the input (Ctrl-D) and KeyboardInterrupt on
    Ctrl-C. Each side remembers its own answers.
    """
    from lorasmith.data.example import Message

    histories: list[list[Message]] = [[] for _ in sides]
    is_leaving = False  # the last thing that happened was a Ctrl-C at the prompt
    while True:
        try:
            line = read_line().strip()
        except EOFError:
            out.write("\n")
            return
        except KeyboardInterrupt:
            out.write("\n")
            if is_leaving:
                return
            is_leaving = True
            note("(Ctrl-C again leaves)")
            continue
        is_leaving = False
        if line in ("/exit", "/quit"):
            return
        if line == "/help":
            out.write(HELP + "\n")
        elif line == "/reset":
            for history in histories:
                history.clear()
            note("(a new conversation)")
        elif line.startswith("/") and " " not in line and line.count("/") == 1:
            note(f"There is no command {line}. /help lists them.")
        elif line:
            with stop_on_interrupt() as is_stopped:
                for side, history in zip(sides, histories, strict=True):
                    if is_stopped():
                        break
                    if len(sides) > 1:
                        out.write(f"[{side.label}]\n")
                    _take_turn(side, history, line, sampling, out, is_stopped, system, override_system)


def _take_turn(
    side: Side,
    history: "list[Message]",
    line: str,
    sampling: SamplingSettings,
    out: TextIO,
    is_stopped: Callable[[], bool],
    system: str | None,
    override_system: bool,
) -> None:
    """Answer ``line`` and add the turn to ``history``; a turn without any answer is not remembered."""
    from lorasmith.data.example import Message

    asked = [*history, Message("user", line)]
    try:
        text = write_answer(
            side.chat,
            asked,
            out,
            sampling=sampling,
            system=system,
            override_system=override_system,
            is_stopped=is_stopped,
        )
    except LorasmithError as error:
        note(f"{error} (/reset begins a new conversation)" if history else str(error))
        return
    except KeyboardInterrupt:  # the second Ctrl-C, before the first was looked at
        out.write("\n")
        return
    if is_stopped():
        note("(stopped)")
    if text:
        history[:] = [*asked, Message("assistant", text)]
