"""What packing will save, known before the first step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorasmith.data.tokens import TokenizedExample
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
    dataset: Sequence[TokenizedExample], batch_size: int, *, seed: int = 0, min_prefix_tokens: int = 8
) -> Gain:
    """Return the tokens of one epoch of ``dataset`` in steps of ``batch_size`` examples, in a seeded order."""
    order = np.random.default_rng([seed, 0]).permutation(len(dataset))
    steps = [order[low : low + batch_size] for low in range(0, len(order), batch_size)]
    counted = steps[:_MOST_STEPS_COUNTED]
    padded = packed = shared = 0
    for step in counted:
        examples = [dataset[index] for index in step.tolist()]
        padded += max(len(example.input_ids) for example in examples) * len(examples)
        step_packed, step_shared = count_tokens(examples, min_prefix_tokens=min_prefix_tokens)
        packed += step_packed
        shared += step_shared
    scale = len(order) / max(1, sum(len(step) for step in counted))
    return Gain(
        round(padded * scale), round(packed * scale), round(shared * scale), len(counted) < len(steps)
    )
