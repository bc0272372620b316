"""What every base knows a little of: general questions and a text, asked before and after to see what was forgotten.

Both are in the package, so that a probe needs no network and is the same everywhere. The text is public domain:
openings of Alice's Adventures in Wonderland (1865), A Scandal in Bohemia (1891), Pride and Prejudice (1813),
Walden (1854), On the Origin of Species (1859), the Constitution of the United States (1787), Moby-Dick (1851).
"""

import importlib.resources
from pathlib import Path

from lorasmith.evaluation.questions import EvaluationRow, read_evaluation_rows

PROBE_TOKENS = 40  # a right answer comes at once; the base's long ones are cut here


def general_questions() -> list[EvaluationRow]:
    """Return the questions with the keywords of their right answers."""
    with importlib.resources.as_file(_here() / "general_questions.json") as file:
        return read_evaluation_rows(Path(file))


def general_text() -> list[str]:
    """Return the text's passages."""
    return (_here() / "general_text.txt").read_text("utf-8").strip().split("\n\n")


def _here():
    return importlib.resources.files("lorasmith.evaluation")
