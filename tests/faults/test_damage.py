"""Damaged and changed files under a run: noticed, named, and the checkpoint before is used."""

import json
import os
import random
import shutil
import time

import pytest

from lorasmith.errors import DataError, ResumeError
from lorasmith.files import find_damage, sha256_of
from lorasmith.model import base as base_module
from lorasmith.model.base import load_tokenizer, resolve_base
from lorasmith.model.settings import BaseSettings
from lorasmith.training.checkpoint import last_checkpoint

from .conftest import tree_of
from .dying import train_file, train_three_steps

NEEDED = (
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "optimizer.safetensors",
    "state.json",
)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    train_three_steps(run_dir)
    return run_dir


@pytest.mark.parametrize("name", [*NEEDED, "SHA256SUMS", "adapter/SHA256SUMS"])
def test_every_bit_and_every_length_of_a_checkpoint_counts(two_checkpoints, tmp_path, name):
    """Every bit of the small files, 200 of the large ones; and as many lengths that a crash could have left."""
    folder = shutil.copytree(two_checkpoints / "checkpoints" / "step-000003", tmp_path / "step")
    content = (folder / name).read_bytes()
    num_bits = len(content) * 8
    bits = range(num_bits) if num_bits < 8000 else random.Random(1).sample(range(num_bits), 200)
    for bit in bits:
        harmed = bytearray(content)
        harmed[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(harmed)
        assert find_damage(folder, NEEDED), f"bit {bit} of {name}"
    for length in range(0, len(content), max(1, len(content) // 200)):
        (folder / name).write_bytes(content[:length])
        assert find_damage(folder, NEEDED), f"{name} cut after {length} bytes"
    (folder / name).write_bytes(content)
    assert find_damage(folder, NEEDED) == []


def test_the_sums_are_those_of_sha256sum(two_checkpoints):
    folder = two_checkpoints / "checkpoints" / "step-000003"
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    assert f"{sha256_of(folder / 'state.json')}  state.json" in lines
    assert len(lines) == len([path for path in folder.rglob("*") if path.is_file()]) - 1


@pytest.mark.parametrize("name", ["../outside", "/dev/zero", "adapter/../../outside"])
def test_sums_do_not_lead_out_of_the_folder(two_checkpoints, tmp_path, name):
    folder = shutil.copytree(two_checkpoints / "checkpoints" / "step-000003", tmp_path / "step")
    with (folder / "SHA256SUMS").open("a") as sums:
        sums.write(f"{'0' * 64}  {name}\n")
    assert find_damage(folder, NEEDED) == [f"SHA256SUMS names {name}, outside the folder"]


def test_the_one_before_is_used_and_that_is_said(two_checkpoints, tmp_path):
    run_dir = shutil.copytree(two_checkpoints, tmp_path / "run")
    whole = tree_of(run_dir)
    (run_dir / "checkpoints" / "step-000003" / "optimizer.safetensors").write_bytes(b"")
    checkpoint, complaints = last_checkpoint(run_dir)
    assert checkpoint.step == 1
    assert complaints == [
        "step-000003 is damaged (optimizer.safetensors is not as it was written): the one before it is used"
    ]
    train_three_steps(run_dir)
    assert tree_of(run_dir) == whole


def test_no_whole_checkpoint_is_refused_by_name_with_the_way_out(two_checkpoints, tmp_path):
    run_dir = shutil.copytree(two_checkpoints, tmp_path / "run")
    for state in run_dir.rglob("state.json"):
        state.unlink()
    with pytest.raises(ResumeError) as refused:
        train_three_steps(run_dir)
    text = str(refused.value)
    assert "step-000001 is damaged (state.json is missing)" in text
    assert "step-000003 is damaged (state.json is missing)" in text
    assert f"remove {run_dir / 'checkpoints'} to train from the beginning" in text


def test_a_clock_that_jumps_changes_nothing(two_checkpoints, tmp_path, monkeypatch):
    """Not back by ten years between two saves, nor forward, nor files whose times are in the wrong order."""
    run_dir = tmp_path / "run"
    for last_step, jump in ((1, -3e8), (2, 3e8), (3, -1e9)):
        monkeypatch.setattr(time, "time", lambda jump=jump, clock=time.time: clock() + jump)
        train_three_steps(run_dir, last_step=last_step)
        for path in (run_dir / "checkpoints").rglob("*"):
            newest_first = 2e9 - int("".join(filter(str.isdigit, str(path.relative_to(run_dir))[:24])) or 0)
            os.utime(path, (newest_first, newest_first))
        monkeypatch.undo()
    assert tree_of(run_dir) == tree_of(two_checkpoints)


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def change_data(folder):
    edit(folder / "rows.json", "It is the 7th.", "It is the 8th.")


def change_validation(folder):
    edit(folder / "validation.json", "Yes.", "No!!")


def change_tokenizer(folder):
    edit(folder / "base" / "tokenizer.json", '"ignore_merges": false', '"ignore_merges": true')


def change_base(folder):
    file = folder / "base" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)


def change_template(folder):
    edit(folder / "base" / "chat_template.jinja", "message['role']", "message['role'] + ':'")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_data, r"data: \S+rows\.json has changed since"),
        (change_validation, r"data\.validation: it has changed since"),
        (change_tokenizer, "base: its tokenizer has changed since"),
        (change_base, r"base: weights \w{12} then, \w{12} now"),
        (change_template, "prompt: it renders another text than then"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_changed_under_a_stopped_run_is_named(
    run_until, run_file, tiny_base_folder, tmp_path, change, named
):
    shutil.copytree(tiny_base_folder, tmp_path / "base")
    edit(run_file, str(tiny_base_folder), "base")
    edit(run_file, "train: rows.json", "train: rows.json, validation: validation.json")
    (tmp_path / "validation.json").write_text(json.dumps([{"instruction": "Is it?", "output": "Yes."}]))
    assert run_until("step-000004", train_file, tmp_path / "run", run_file) == (-9, None)
    assert last_checkpoint(tmp_path / "run")[0] is not None
    change(tmp_path)
    with pytest.raises(ResumeError, match=named):
        train_file(tmp_path / "run", run_file)


def test_data_that_is_gone_is_named(run_file, tmp_path):
    (tmp_path / "rows.json").unlink()
    with pytest.raises(DataError, match=r"rows\.json does not exist"):
        train_file(tmp_path / "run", run_file)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "SHA256SUMS", "config.json"])
def test_a_damaged_copy_of_a_base_is_made_again(tmp_path, monkeypatch, tiny_base_folder, name):
    monkeypatch.setenv("LORASMITH_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "lorasmith.model.gguf.convert_gguf",
        lambda file, folder: shutil.copytree(tiny_base_folder, folder, dirs_exist_ok=True),
    )
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    said = []
    found = resolve_base(BaseSettings(model=str(tmp_path / "m.gguf")), tell=said.append)
    assert [line for line in said if "is damaged" in line] == []
    content = (found.folder / name).read_bytes()
    (found.folder / name).write_bytes(content[: len(content) // 2])
    again = resolve_base(BaseSettings(model=str(tmp_path / "m.gguf")), tell=said.append)
    assert again == found
    assert any("is damaged" in line and "it is made again" in line for line in said)
    assert (found.folder / name).read_bytes() == content
    load_tokenizer(again)
    said.clear()
    base_module.resolve_base(BaseSettings(model=str(tmp_path / "m.gguf")), tell=said.append)
    assert said == []
