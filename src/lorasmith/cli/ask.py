"""``lorasmith ask``: one question, one streamed answer. Only the answer goes to stdout."""

import sys
from typing import Annotated

import typer

from lorasmith.cli import answering
from lorasmith.cli.answering import open_sides, write_answer
from lorasmith.errors import SettingsError
from lorasmith.generation.sampling import parse_sampling


def command(
    question: Annotated[str, typer.Argument(help="The question; - reads it from stdin.")],
    run: answering.Run = None,
    base: answering.Untuned = False,
    compare: answering.Compare = False,
    input: Annotated[str, typer.Option(help="Context of the question, as the input of an Alpaca row.")] = "",
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
    """Ask one question.

    The answer is streamed to stdout as plain text, so that it can be piped; notes go to stderr.
    """
    sampling = parse_sampling(
        temperature=temperature, top_p=top_p, max_tokens=max_tokens, stop=stop, seed=seed
    )
    if question == "-":
        question = sys.stdin.read()
    if not question.strip():
        raise SettingsError('The question is empty. Ask something: lorasmith ask "When is payday?"')
    sides = open_sides(run, untuned=base, compare=compare, base_model=base_model, device=device, dtype=dtype)
    from lorasmith.data.example import Message

    asked = [Message("user", question, input)]
    for side in sides:
        if len(sides) > 1:
            sys.stdout.write(f"[{side.label}]\n")
        write_answer(
            side.chat, asked, sys.stdout, sampling=sampling, system=system, override_system=override_system
        )
