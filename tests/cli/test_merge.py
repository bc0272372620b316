"""The merge command: the proof on screen, the questions from a file, the faults before any work."""

import pytest
import torch

from conftest import make_tiny_model
from lorasmith.cli.merge import command
from lorasmith.errors import DataError, SettingsError
from lorasmith.model.adapter import save_adapter
from lorasmith.model.method_settings import LoraSettings
from lorasmith.model.methods import attach_adapter


@pytest.fixture
def adapter(tmp_path, tiny_base_folder):
    model = make_tiny_model("llama")
    model.name_or_path = str(tiny_base_folder)
    adapted = attach_adapter(model, LoraSettings(r=2), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    save_adapter(adapted, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_proof_is_printed_with_its_limits(tmp_path, adapter, capsys):
    (tmp_path / "questions.txt").write_text("When is payday?\n\nWhere is the office?\n")
    command(run=adapter, out=tmp_path / "merged", prompts=tmp_path / "questions.txt", device="cpu")
    printed = capsys.readouterr().out
    assert "asked with the recipe chat" in printed
    for text in ("largest logit difference", "2 of 2", "limit (float32)", "Proven equal", "shard by shard"):
        assert text in printed
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_questions_is_refused(tmp_path, adapter, text):
    (tmp_path / "questions.txt").write_text(text)
    with pytest.raises(DataError, match="holds no question"):
        command(run=adapter, out=tmp_path / "merged", prompts=tmp_path / "questions.txt")
    assert not (tmp_path / "merged").exists()


def test_an_unknown_dtype_is_refused_with_those_that_are_known(tmp_path, adapter):
    with pytest.raises(SettingsError, match="int8; it can be auto, float32, bfloat16, float16"):
        command(run=adapter, out=tmp_path / "merged", dtype="int8")
