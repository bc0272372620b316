"""Adapters from strangers: refused by name before anything of them is loaded, whoever asks for them."""

import json
import struct

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import lorasmith
from conftest import make_tiny_model
from lorasmith.errors import AdapterError, SettingsError
from lorasmith.model.adapter_folder import named_base, read_adapter_config

WEIGHTS = "adapter_model.safetensors"
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.fixture
def folder(tmp_path, tiny_base_folder):
    """A good adapter that plain PEFT wrote."""
    model = make_tiny_model("llama")
    model.name_or_path = str(tiny_base_folder)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def set_config(**values):
    def change(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def set_weights(change):
    def apply(folder):
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)

    return apply


def lie_about_shape(folder):
    """A header that promises 10**9 rows in a file of some hundred bytes."""
    header = {
        key: {"dtype": "F32", "shape": [10**9, 32], "data_offsets": [0, 128 * 10**9]} for key in (A,)
    } | {B: {"dtype": "F32", "shape": [32, 10**9], "data_offsets": [128 * 10**9, 256 * 10**9]}}
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 100)
    set_config(r=10**9)(folder)


def huge_header(folder):
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", 2**60) + b"{}")


def pickle_only(name):
    def change(folder):
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.")

    return change


def link_out(name):
    def change(folder):
        outside = folder.parent / f"outside-{name}"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return change


def cut(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-1])


def wide(weights):
    """Rank 200 on a layer of 32 numbers, with a config that says so."""
    return {k: torch.ones((200, 32) if "lora_A" in k else (32, 200)) for k in weights}


STRANGE = {
    "pickle .bin": (pickle_only("adapter_model.bin"), r"holds adapter_model\.bin, a Python pickle"),
    "pickle .pt": (pickle_only("adapter.pt"), r"holds adapter\.pt, a Python pickle"),
    "weights are a link": (link_out(WEIGHTS), "is a link to .*outside its folder"),
    "config is a link": (link_out("adapter_config.json"), "is a link to .*outside its folder"),
    "another method": (set_config(peft_type="LOHA"), "is of the method LOHA.*lorasmith opens LORA"),
    "prompt tuning": (set_config(peft_type="PROMPT_TUNING"), "PROMPT_TUNING|does not know"),
    "another task": (set_config(task_type="SEQ_CLS"), "is for the task 'SEQ_CLS'"),
    "remote code": (
        set_config(auto_mapping={"base_model_class": "X", "parent_library": "os"}),
        r"wants Python code from 'os' \(auto_mapping\)",
    ),
    "imports megatron": (
        set_config(megatron_config={"a": 1}, megatron_core="megatron.evil"),
        "sets megatron_config",
    ),
    "copies layers": (set_config(layer_replication=[[0, 10**9]]), "sets layer_replication"),
    "a newer setting": (
        set_config(new_kind_of_lora=True),
        "sets 'new_kind_of_lora', which this version of PEFT",
    ),
    "rank of a billion": (set_config(r=10**9), r"has lora_A \[2, 32\] .* says r=1000000000"),
    "rank of a billion for one layer": (set_config(rank_pattern={"q_proj": 10**9}), "says r=1000000000"),
    "negative rank": (set_config(r=-1), "has the rank -1"),
    "rank that is true": (set_config(r=True), "has the rank True"),
    "rank above the layer": (
        lambda folder: (set_weights(wide)(folder), set_config(r=200)(folder)),
        "has rank 200 on .* a layer of 32 inputs and 32 outputs",
    ),
    "rank in the header only": (lie_about_shape, "is damaged"),
    "header of an exabyte": (huge_header, "is damaged"),
    "infinite lora_alpha": (set_config(lora_alpha=float("inf")), "has the lora_alpha inf"),
    "lora_alpha that is text": (set_config(lora_alpha="16"), "has the lora_alpha '16'"),
    "layers that are numbers": (set_config(target_modules=[3]), r"has \[3\] as target_modules"),
    "kept layers without a name": (
        lambda folder: (
            set_weights(lambda w: {**w, "base_model.model.model.norm.weight": torch.zeros(32)})(folder),
            set_config(modules_to_save=[""])(folder),
        ),
        r"has \[''\] as modules_to_save",
    ),
    "kept layers named as every tensor ends": (
        lambda folder: (
            set_weights(lambda w: {**w, "base_model.model.model.norm.weight": torch.zeros(32)})(folder),
            set_config(modules_to_save=["weight"])(folder),
        ),
        "which is no part of a LoRA adapter",
    ),
    "pattern that is a list": (set_config(rank_pattern=[1]), r"has \[1\] as rank_pattern"),
    "cut short": (cut, "is damaged.*Copy it again"),
    "NaN": (set_weights(lambda w: {**w, A: w[A] * float("nan")}), "NaN or infinite"),
    "infinity": (set_weights(lambda w: {**w, B: w[B] * float("-inf")}), "NaN or infinite"),
    "wrong shape": (set_weights(lambda w: {**w, A: w[A].T.contiguous()}), r"has lora_A \[32, 2\]"),
    "three dimensions": (
        set_weights(lambda w: {**w, A: w[A][None].contiguous()}),
        r"has lora_A \[1, 2, 32\]",
    ),
    "whole numbers": (set_weights(lambda w: {**w, A: w[A].int()}), "as I32; LoRA's are floats"),
    "half a pair": (set_weights(lambda w: {k: v for k, v in w.items() if k != B}), "it has only lora_A"),
    "no tensor": (set_weights(lambda w: {"x": torch.zeros(1)}), "'x', which is no part of a LoRA adapter"),
    "a weight of the base": (
        set_weights(lambda w: {**w, "base_model.model.model.norm.weight": torch.zeros(32)}),
        r"norm\.weight', which is no part of a LoRA adapter: it would replace a weight of the base",
    ),
    "a name with a path": (
        set_weights(lambda w: {**w, "../../etc/passwd": torch.zeros(1)}),
        r"'\.\./\.\./etc/passwd', which is no part",
    ),
    "config of 2 MB": (set_config(x="y" * (2 << 20)), "which no PEFT config has"),
    "config of brackets": (
        lambda folder: (folder / "adapter_config.json").write_text("[" * 100_000),
        r"adapter_config\.json is damaged",
    ),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_strange_adapter_is_refused_by_name(folder, kind, monkeypatch):
    """By whatever opens one, and before a base is looked for or PEFT sees the folder."""
    change, text = STRANGE[kind]
    assert read_adapter_config(folder)["r"] == 2
    change(folder)
    monkeypatch.setattr("lorasmith.model.found.resolve_base", lambda *args, **kwargs: pytest.fail("a base"))
    monkeypatch.setattr(PeftModel, "from_pretrained", lambda *args, **kwargs: pytest.fail("PEFT"))
    for open_it in (
        lambda: read_adapter_config(folder),
        lambda: lorasmith.open_chat(folder),
        lambda: lorasmith.merge(folder, folder.parent / "merged"),
    ):
        with pytest.raises(AdapterError, match=text):
            open_it()
    assert not (folder.parent / "merged").exists()
    assert not (folder.parent / "owned").exists()


def test_the_same_adapter_unharmed_is_taken(folder, tiny_base_folder):
    assert named_base(read_adapter_config(folder), folder) == str(tiny_base_folder)
    chat = lorasmith.open_chat(folder)
    assert isinstance(chat.ask("When is payday?").text, str)


def test_links_of_the_hubs_cache_are_its_own(folder):
    snapshot = folder.parent / "models--a--b" / "snapshots" / "0123"
    blobs = folder.parent / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("adapter_config.json", WEIGHTS):
        (folder / name).rename(blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert read_adapter_config(snapshot)["r"] == 2


@pytest.mark.parametrize("name", ["../up", "a/../../up", "/abs", ".hidden/../x", "a\0b"])
def test_a_run_cannot_be_named_out_of_its_folder(name):
    with pytest.raises(SettingsError, match=r"run\.name"):
        lorasmith.load_run_file(None, ["data.train=x.json", f"run.name={name}"])
