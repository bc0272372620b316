"""What packing will save, known before the first step."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorasmith.data.tokens import TokenizedExample, num_rows
from lorasmith.packing.trie import count_tokens

_MOST_STEPS_COUNTED = 2_000


@dataclass(frozen=True, slots=True)
class Gain:
    """Tokens that one epoch computes, by three ways of laying out its steps.

    ``is_estimate``: counted on a sample of steps and scaled up, for large data.
    """

    padded: int  # every example as long as the longest of its step
    packed: int  # examples one after the other
    shared: int  # and each shared prefix once
    is_estimate: bool


def predict_gain(
    dataset: Sequence[TokenizedExample],
    batch_size: int,
    *,
    order: Callable[[int], Sequence[int]],
    min_prefix_tokens: int = 8,
) -> Gain:
    """Return the tokens of one epoch of ``dataset`` in steps of ``batch_size`` rows.

    ``order`` names the examples of step 0, 1, ...
    """
    num_steps = math.ceil(num_rows(dataset) / batch_size)
    num_counted = min(num_steps, _MOST_STEPS_COUNTED)
    counted = padded = packed = shared = 0
    for step in range(num_counted):
        examples = [dataset[index] for index in order(step)]
        counted += len(examples)
        padded += max(len(example.input_ids) for example in examples) * len(examples)
        step_packed, step_shared = count_tokens(examples, min_prefix_tokens=min_prefix_tokens)
        packed += step_packed
        shared += step_shared
    scale = len(dataset) / max(1, counted)
    return Gain(round(padded * scale), round(packed * scale), round(shared * scale), num_counted < num_steps)
