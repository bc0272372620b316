"""Whatever is named is found with its recipe; its fingerprint follows its weights."""

import json
import re
from dataclasses import replace

import pytest
import torch

from conftest import make_tiny_model
from lorasmith.data.prompts import choose_recipe
from lorasmith.data.settings import PromptSettings
from lorasmith.errors import AdapterError, RunError
from lorasmith.model.adapter import save_adapter
from lorasmith.model.base import resolve_base
from lorasmith.model.device import DeviceChoice
from lorasmith.model.found import find_adapted, find_model
from lorasmith.model.method_settings import LoraSettings
from lorasmith.model.methods import attach_adapter
from lorasmith.model.run_record import RunRecord, write_run_record
from lorasmith.model.settings import BaseSettings


@pytest.fixture
def run_dir(tmp_path, tiny_base_folder, tiny_tokenizer):
    model = attach_adapter(make_tiny_model("llama"), LoraSettings(r=2), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    for place in ("adapter", "checkpoints/step-000001/adapter"):
        save_adapter(model, tmp_path / "run" / place)
        torch.nn.init.zeros_(next(p for name, p in model.named_parameters() if "lora_B" in name))
    record = RunRecord(
        name="run",
        base=resolve_base(BaseSettings(model=str(tiny_base_folder))).ref,
        recipe=choose_recipe(PromptSettings(recipe="alpaca"), tiny_tokenizer)[0].to_json(),
        settings={"base": {"trust_remote_code": False}},
        data={},
    )
    write_run_record(tmp_path / "run", record)
    return tmp_path / "run"


def test_a_run_its_adapter_and_a_checkpoint_share_the_recipe(run_dir):
    run = find_model(run_dir)
    same, checkpoint = (
        find_model(run_dir / "adapter"),
        find_model(run_dir / "checkpoints/step-000001/adapter"),
    )
    assert run.recipe.name == same.recipe.name == checkpoint.recipe.name == "alpaca"
    assert run.fingerprint() == same.fingerprint() != checkpoint.fingerprint()
    assert run.notes == ()


def test_what_a_run_was_before_tuning_trusts_as_the_run_did(run_dir):
    found = replace(find_model(run_dir), tuned_from=find_model(run_dir).record.base)
    settings = {"base": {"trust_remote_code": True}}
    trusting = replace(found, record=found.record.model_copy(update={"settings": settings}))
    assert (found.before_tuning().trust_remote_code, trusting.before_tuning().trust_remote_code) == (
        False,
        True,
    )
    assert trusting.before_tuning().tuned_from is None


def test_a_whole_model_has_no_adapter_and_says_how_it_is_asked(run_dir, tiny_base_folder):
    found = find_model(tiny_base_folder)
    assert found.adapter is None
    assert found.fingerprint() != find_model(run_dir).fingerprint()
    assert "recipe chat" in found.notes[0]
    model = found.load(DeviceChoice(torch.device("cpu"), torch.float32, ""))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_only_runs_and_adapters_are_adapted(run_dir, tiny_base_folder):
    with pytest.raises(RunError, match=r"without run\.json"):
        find_adapted(tiny_base_folder)
    (run_dir / "adapter").rename(run_dir / "elsewhere")
    assert json.loads((run_dir / "run.json").read_text())["result"] is None
    told = f"no adapter/ yet. Finish it: lorasmith train RUN.yaml --name {run_dir.name} --resume"
    with pytest.raises(AdapterError, match=re.escape(told)):
        find_model(run_dir)
