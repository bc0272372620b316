"""The command for vLLM says all that the recipe says, and what vLLM would refuse or compute wrongly is refused here."""

import json
import os
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from lorasmith.cli.serve import command
from lorasmith.errors import AdapterError, RecipeError, SettingsError
from lorasmith.generation.chat import Chat
from lorasmith.model.found import find_run
from lorasmith.serve import vllm
from lorasmith.serve.settings import ServeSettings
from lorasmith.serve.vllm import plan_vllm


@pytest.fixture
def words(trained_run):
    return plan_vllm([("faq", trained_run)], ServeSettings(port=9000)).words


def value(words, flag):
    return words[words.index(flag) + 1]


def test_the_command_names_base_adapter_rank_and_address(words, trained_run):
    found = find_run(trained_run)
    assert words[:3] == ("vllm", "serve", str(found.base.folder))
    assert value(words, "--lora-modules") == f"faq={found.adapter.resolve()}"
    assert value(words, "--max-lora-rank") == "16"
    assert value(words, "--served-model-name") == found.base.folder.name
    assert (value(words, "--host"), value(words, "--port")) == ("127.0.0.1", "9000")


def test_the_base_of_a_hub_is_called_as_our_own_server_calls_it(trained_run, monkeypatch):
    found = find_run(trained_run)
    base = replace(found.base, ref=replace(found.base.ref, id="people/small"))
    monkeypatch.setattr(vllm, "find_adapted", lambda *_, **__: replace(found, base=base))
    words = plan_vllm([("faq", trained_run)], ServeSettings()).words
    assert value(words, "--served-model-name") == "people/small"


def test_the_template_gives_the_trained_prompt_and_the_end_tokens_are_the_recipes(words, trained_run):
    found = find_run(trained_run)
    found.tokenizer.chat_template = Path(value(words, "--chat-template")).read_text()
    asked = [{"role": "user", "content": "What is 1 plus 1?"}]
    ids = found.tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    chat = Chat.open(found, device="cpu", dtype="float32")
    assert list(ids) == chat.encode_prompt("What is 1 plus 1?")
    config = json.loads((Path(value(words, "--generation-config")) / "generation_config.json").read_text())
    assert config == {"eos_token_id": found.recipe.stop_token_ids(found.tokenizer)[0]}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"use_dora": True}, "it is a DoRA adapter"),
        ({"modules_to_save": ["norm"]}, "it keeps whole layers of its own"),
        ({"alpha_pattern": {"q_proj": 3}}, "its layers are scaled unlike"),
    ],
)
def test_what_vllm_refuses_is_refused_with_the_way_out(trained_run, tmp_path, change, why):
    shutil.copytree(trained_run, tmp_path / "faq")
    adapter = tmp_path / "faq" / "adapter"
    (adapter / "SHA256SUMS").unlink()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(AdapterError, match=rf"vLLM does not take the adapter faq: {why}.*--base MERGED"):
        plan_vllm([("faq", tmp_path / "faq")], ServeSettings())


def test_two_recipes_do_not_fit_one_server(trained_run, tmp_path):
    shutil.copytree(trained_run, tmp_path / "other")
    record = json.loads((tmp_path / "other" / "run.json").read_text())
    recipe = find_run(trained_run).recipe
    record["recipe"] = replace(recipe, system="Be brief.", stop=("END",)).to_json()
    (tmp_path / "other" / "run.json").write_text(json.dumps(record))
    with pytest.raises(RecipeError, match="were trained with other prompt recipes"):
        plan_vllm([("faq", trained_run), ("other", tmp_path / "other")], ServeSettings())
    notes = " ".join(plan_vllm([("other", tmp_path / "other")], ServeSettings(port=9000, max_rows=4)).notes)
    assert 'clients must send stop=["END"]' in notes
    assert "that vLLM is not told of: max_rows." in notes
    assert "another system prompt than the trained one is answered" in notes


def test_it_is_printed_or_run(trained_run, tmp_path, capsys, monkeypatch):
    command(run=[str(trained_run)], engine="vllm")
    printed = shlex.split(capsys.readouterr().out)
    assert printed[:2] == ["vllm", "serve"]
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingsError, match="There is no vllm on the path"):
        command(run=[str(trained_run)], engine="vllm", execute=True)
    with pytest.raises(SettingsError, match="--dtype would be ignored beside --engine vllm"):
        command(run=[f"faq={trained_run}"], engine="vllm", dtype="bfloat16")
    with pytest.raises(SettingsError, match="--exec belongs to --engine vllm"):
        command(run=[str(trained_run)], execute=True)
    fake = tmp_path / "vllm"
    fake.write_text("#!/bin/sh\n")
    fake.chmod(0o755)
    became = []
    monkeypatch.setattr(os, "execvp", lambda program, words: became.append((program, list(words))))
    command(run=[str(trained_run)], engine="vllm", execute=True)
    assert became == [("vllm", printed)]
