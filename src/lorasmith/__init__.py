"""Teach a LLaMA-family model what a team knows: train, ask, merge with proof.

    settings = lorasmith.load_run_file("run.yaml")
    for report in lorasmith.train(settings, "runs/mine"):
        print(report.step, report.loss)
    print(lorasmith.Chat.from_run("runs/mine").ask("When is payday?").text)
    print(lorasmith.merge("runs/mine", "merged/mine"))

The names are imported when they are first used: ``import lorasmith`` costs no torch import.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Chat": "lorasmith.generation.chat",
    "Example": "lorasmith.data.example",
    "LorasmithError": "lorasmith.errors",
    "Message": "lorasmith.data.example",
    "RunFile": "lorasmith.cli.run_file",
    "SamplingSettings": "lorasmith.generation.sampling",
    "evaluate_answers": "lorasmith.evaluation.answers",
    "load_run_file": "lorasmith.cli.run_file",
    "merge": "lorasmith.export.merge",
    "open_chat": "lorasmith.generation.chat",
    "open_pipeline": "lorasmith.generation.pipeline",
    "train": "lorasmith.cli.run_file",
}

if TYPE_CHECKING:
    from lorasmith.cli.run_file import RunFile, load_run_file, train
    from lorasmith.data.example import Example, Message
    from lorasmith.errors import LorasmithError
    from lorasmith.evaluation.answers import evaluate_answers
    from lorasmith.export.merge import merge
    from lorasmith.generation.chat import Chat, open_chat
    from lorasmith.generation.pipeline import open_pipeline
    from lorasmith.generation.sampling import SamplingSettings

__all__ = [
    "Chat",
    "Example",
    "LorasmithError",
    "Message",
    "RunFile",
    "SamplingSettings",
    "evaluate_answers",
    "load_run_file",
    "merge",
    "open_chat",
    "open_pipeline",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lorasmith' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
