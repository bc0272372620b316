"""What the tests of training share: examples of random tokens and a tiny adapted model."""

import numpy as np
import pytest

from conftest import make_tiny_model
from lorasmith.data.tokens import IGNORE_INDEX, TokenizedExample
from lorasmith.model.method_settings import LoraSettings
from lorasmith.model.methods import attach_adapter


def make_examples(count: int, seed: int = 0) -> list[TokenizedExample]:
    """Examples of 6 to 24 tokens, the last 2 to 5 learnt, all beginning with the same ten."""
    random = np.random.default_rng(seed)
    examples = []
    for number in range(count):
        ids = np.concatenate([np.arange(10, 20), random.integers(20, 400, random.integers(6, 24))]).astype(
            np.int32
        )
        labels = np.full(len(ids), IGNORE_INDEX, np.int32)
        learnt = random.integers(2, 6)
        labels[-learnt:] = ids[-learnt:]
        examples.append(TokenizedExample(ids, labels, f"data.jsonl:{number + 1}"))
    return examples


def make_adapted(family: str = "llama", **lora):
    return attach_adapter(make_tiny_model(family), LoraSettings(r=4, lora_alpha=8, **lora), seed=3)


@pytest.fixture
def examples():
    return make_examples(20)
