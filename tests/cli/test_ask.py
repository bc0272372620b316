"""Only the answer goes to stdout; what cannot be asked is said before a model is loaded."""

import io
import os
import sys

import pytest
import torch

from conftest import make_tiny_model
from lorasmith.cli.answering import find_newest_run, make_harmless
from lorasmith.cli.ask import command
from lorasmith.data.prompts import choose_recipe
from lorasmith.data.settings import PromptSettings
from lorasmith.errors import AdapterError, RecipeError, RunError, SettingsError
from lorasmith.generation.chat import open_chat
from lorasmith.generation.sampling import SamplingSettings
from lorasmith.model.adapter import save_adapter
from lorasmith.model.base import resolve_base
from lorasmith.model.method_settings import LoraSettings
from lorasmith.model.methods import attach_adapter
from lorasmith.model.run_record import RunRecord, write_run_record
from lorasmith.model.settings import BaseSettings

ON_CPU = {"device": "cpu", "dtype": "float32"}
SHORT = SamplingSettings(max_tokens=6)
SYSTEM = "You are a helpful assistant."


def write_run(run_dir, base_folder, tokenizer, created):
    """A finished run over the tiny base, as training writes it."""
    adapted = attach_adapter(make_tiny_model("llama"), LoraSettings(r=4), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    save_adapter(adapted, run_dir / "adapter")
    recipe, _ = choose_recipe(PromptSettings(recipe="chat", system=SYSTEM), tokenizer)
    base = resolve_base(BaseSettings(model=str(base_folder))).ref
    record = RunRecord(
        name=run_dir.name, created=created, base=base, recipe=recipe.to_json(), settings={}, data={}
    )
    write_run_record(run_dir, record)


@pytest.fixture
def run_dir(tmp_path, monkeypatch, tiny_base_folder, tiny_tokenizer):
    """The newest of two runs in runs/, where the command is called; a third one was never trained."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs/old", tiny_base_folder, tiny_tokenizer, "2026-01-01T00:00:00+00:00")
    write_run(tmp_path / "runs/new", tiny_base_folder, tiny_tokenizer, "2026-02-01T00:00:00+00:00")
    write_run(tmp_path / "runs/untrained", tiny_base_folder, tiny_tokenizer, "2026-03-01T00:00:00+00:00")
    (tmp_path / "runs/untrained/adapter").rename(tmp_path / "elsewhere")
    return tmp_path / "runs/new"


def test_the_answer_alone_is_on_stdout(run_dir, capsys):
    command("When is payday?", max_tokens=6, **ON_CPU)
    printed = capsys.readouterr()
    expected = open_chat(run_dir, **ON_CPU).ask("When is payday?", sampling=SHORT).text
    assert printed.out == expected + "\n"
    assert "runs/new, the newest run" in printed.err
    assert "cut after 6 tokens" in printed.err


def test_base_and_compare(run_dir, capsys):
    chat = open_chat(run_dir, **ON_CPU)
    tuned, untuned = (side.ask("Hi", sampling=SHORT).text for side in (chat, chat.base()))
    assert tuned != untuned
    command("Hi", run=str(run_dir), base=True, max_tokens=6, **ON_CPU)
    assert capsys.readouterr().out == untuned + "\n"
    command("Hi", run=str(run_dir), compare=True, max_tokens=6, **ON_CPU)
    assert capsys.readouterr().out == f"[untuned]\n{untuned}\n[tuned]\n{tuned}\n"
    with pytest.raises(SettingsError, match="exclude each other"):
        command("Hi", run=str(run_dir), compare=True, base=True)


def test_the_flags_reach_the_answer(run_dir, capsys):
    sampling = SamplingSettings(temperature=1, top_p=0.9, seed=3, max_tokens=5, stop=("e",))
    expected = open_chat(run_dir, **ON_CPU).ask("Hi", input="A text.", sampling=sampling).text
    command("Hi", input="A text.", temperature=1, top_p=0.9, seed=3, max_tokens=5, stop=["e"], **ON_CPU)
    assert capsys.readouterr().out == expected + "\n"


def test_the_question_may_come_from_stdin(run_dir, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("When is payday?\n"))
    command("-", max_tokens=6, **ON_CPU)
    expected = open_chat(run_dir, **ON_CPU).ask("When is payday?\n", sampling=SHORT).text
    assert capsys.readouterr().out == expected + "\n"


def test_another_system_prompt_needs_an_override(run_dir, capsys):
    with pytest.raises(RecipeError, match="--override-system"):
        command("Hi", system="A pirate.", **ON_CPU)
    assert capsys.readouterr().out == ""
    command("Hi", system="A pirate.", override_system=True, max_tokens=3, **ON_CPU)
    assert capsys.readouterr().out


@pytest.mark.parametrize("question", ["", " \n"])
def test_an_empty_question_loads_nothing(question, monkeypatch):
    monkeypatch.setattr("lorasmith.cli.ask.open_sides", None)
    with pytest.raises(SettingsError, match="question is empty"):
        command(question)


def test_a_base_model_has_nothing_to_compare(tiny_base_folder):
    with pytest.raises(AdapterError, match="no adapter to switch off"):
        command("Hi", run=str(tiny_base_folder), compare=True, **ON_CPU)


def test_no_run_at_all(tmp_path):
    with pytest.raises(RunError, match=r"no trained run in .*lorasmith demo"):
        find_newest_run(tmp_path / "runs")
    os.mkdir(tmp_path / "runs")
    with pytest.raises(RunError, match="no trained run"):
        find_newest_run(tmp_path / "runs")


def test_control_characters_do_not_reach_a_terminal():
    assert make_harmless("a\x1b[31mb\x07\x9bc\nSài\t🙂\r") == "a[31mbc\nSài\t🙂"
