"""A full disk and a read-only one: said in words, nothing half-written, and the run goes on once that is mended."""

import json
import os

import pytest

from lorasmith.data.dataset import prepare_dataset
from lorasmith.data.prompts import choose_recipe
from lorasmith.data.settings import DataSettings, PromptSettings
from lorasmith.errors import DataError, LorasmithError, StorageError
from lorasmith.files import is_locked, storing
from lorasmith.model.adapter_folder import read_adapter_config
from lorasmith.model.run_record import LOCK, list_runs
from lorasmith.training.checkpoint import last_checkpoint

from .conftest import read_only, tree_of
from .dying import train_file, train_three_steps

PAGE = 4096  # bytes: what a tmpfs gives at once


def fill(disk, bytes_left):
    """Fill a disk but for ``bytes_left``; return the file to remove."""
    ballast = disk / "ballast"
    room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
    ballast.write_bytes(b"x" * (room - bytes_left))
    return ballast


def error_of(work):
    """Return the text of the StorageError that ``work`` ends with, None if it does not."""
    try:
        work()
    except StorageError as error:
        return str(error)
    return None


def test_a_save_that_the_disk_has_no_room_for(small_disk, tmp_path):
    train_three_steps(tmp_path / "whole")
    disk = small_disk(2048)
    run_dir = disk / "run"
    train_three_steps(run_dir, last_step=2)
    num_refused = 0
    for pages in range(200):
        ballast = fill(disk, pages * PAGE)
        before = tree_of(run_dir)
        refused = error_of(lambda: train_three_steps(run_dir))
        if refused is None:
            break
        num_refused += 1
        assert (
            f"{run_dir}/checkpoints/step-000003 cannot be written: the disk is full. Free some room"
            in refused
        )
        assert tree_of(run_dir) == before
        assert last_checkpoint(run_dir)[0].step == 2
        ballast.unlink()
    assert 10 < num_refused < 199
    assert tree_of(run_dir) == tree_of(tmp_path / "whole")


@pytest.mark.parametrize("pages", [0, 2, 6, 30])
def test_a_run_on_a_full_disk_goes_on_when_there_is_room(small_disk, run_file, tmp_path, pages):
    train_file(tmp_path / "whole", run_file)
    disk = small_disk(4096)
    ballast = fill(disk, pages * PAGE)
    with pytest.raises(StorageError, match="the disk is full"):
        train_file(disk / "run", run_file)
    assert [path for path in disk.rglob("*") if ".part" in path.name] == []
    ballast.unlink()
    train_file(disk / "run", run_file)
    for name, content in tree_of(tmp_path / "whole").items():
        if "/" in name:
            assert tree_of(disk / "run")[name] == content, name


def test_a_cache_on_a_full_disk_is_told(small_disk, tmp_path, tiny_tokenizer):
    disk = small_disk(64)
    rows = [{"instruction": f"Question {i}?", "output": "word " * 90} for i in range(400)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    recipe, _ = choose_recipe(PromptSettings(), tiny_tokenizer)
    data = DataSettings(train=str(tmp_path / "rows.json"), cache_dir=str(disk / "cache"))
    with pytest.raises(DataError, match=r"the disk is full.*LORASMITH_CACHE"):
        prepare_dataset(data, recipe, tiny_tokenizer)
    assert [path for path in (disk / "cache").rglob("*") if path.is_file()] == []


def test_a_read_only_disk_is_read_and_not_written(small_disk, run_file):
    disk = small_disk(4096)
    run_dir = disk / "run"
    train_file(run_dir, run_file)
    before = tree_of(disk)
    with read_only(disk):
        assert list_runs(disk)[0][0] == run_dir
        assert not is_locked(run_dir / LOCK)
        assert read_adapter_config(run_dir / "adapter")["r"] == 4
        for folder in (run_dir, disk / "new"):
            with pytest.raises(
                StorageError, match=rf"{folder} cannot be written: the disk is mounted read-only"
            ):
                train_file(folder, run_file)
    assert tree_of(disk) == before


def test_a_disk_that_becomes_read_only_while_training(small_disk, tmp_path):
    train_three_steps(tmp_path / "whole")
    disk = small_disk(4096)
    train_three_steps(disk / "run", last_step=2)
    before = tree_of(disk)
    with read_only(disk), pytest.raises(LorasmithError, match="read-only"):
        train_three_steps(disk / "run")
    assert tree_of(disk) == before
    train_three_steps(disk / "run")
    assert tree_of(disk / "run") == tree_of(tmp_path / "whole")


def test_what_is_no_fault_of_the_disk_stays_what_it_is(tmp_path):
    with pytest.raises(FileNotFoundError), storing(tmp_path):
        (tmp_path / "gone").read_text()
