"""Whether a run is compiled is decided by what it would save."""

import pytest
import torch
from torch import nn

from conftest import make_tiny_model
from lorasmith.engine.compilation import choose_compilation, why_not_compile


@pytest.fixture
def model_of_smollm_size(tiny_llama):
    """A tiny model whose config says the sizes that the constants were measured with."""
    config = tiny_llama.config
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 30, 576, 1536
    return tiny_llama


def test_a_short_run_is_not_compiled_and_a_long_one_is(model_of_smollm_size, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/" + name)
    wanted, reason = choose_compilation(model_of_smollm_size, 77_000)
    assert not wanted
    assert "save about 38 s" in reason
    wanted, reason = choose_compilation(model_of_smollm_size, 1_200_000)
    assert wanted
    assert "10 min" in reason


def test_without_a_compiler_it_says_so(model_of_smollm_size, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    wanted, reason = choose_compilation(model_of_smollm_size, 10**9)
    assert not wanted
    assert "no C++ compiler" in reason


def test_what_cannot_be_compiled_is_named():
    assert "layers" in str(why_not_compile(nn.Linear(2, 2), torch.device("cpu")))
    decoder = make_tiny_model("llama").get_decoder()
    assert "Apple" in str(why_not_compile(decoder, torch.device("mps")))
