"""What the preparation of a run tells and refuses once the model is loaded."""

import pytest

from lorasmith.errors import SettingsError
from lorasmith.model.method_settings import METHODS
from lorasmith.model.methods import attach_adapter
from lorasmith.training.job import _check_context


def test_an_example_longer_than_the_model_reads_is_told(tiny_llama):
    assert _check_context(tiny_llama, 512) is None
    advice = _check_context(tiny_llama, 513)
    assert advice is not None
    assert "513 tokens, and the model reads at most 512" in advice
    model = attach_adapter(tiny_llama, METHODS["prompt"](num_virtual_tokens=20), seed=0)
    assert _check_context(model, 492) is None
    with pytest.raises(SettingsError, match=r"num_virtual_tokens is 20, the longest example has 493 tokens"):
        _check_context(model, 493)
