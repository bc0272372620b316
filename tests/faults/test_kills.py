"""SIGKILL before every single thing that saving does to files: the run goes on and ends with the same bytes."""

import os
import random
import shutil

import pytest

from lorasmith.training.checkpoint import best_checkpoint, last_checkpoint

from .conftest import tree_of
from .dying import train_file, train_three_steps

# Of a whole run, so many; "all": at each file operation of it, and of three saves instead of one.
KILLS = os.environ.get("LORASMITH_KILLS", "3")


def test_killed_at_every_file_operation_of_saving(run_until, tmp_path):
    """The save removes an older checkpoint, and keeps the best and the last. What is left is gone on from once."""
    train_three_steps(tmp_path / "whole")
    whole = tree_of(tmp_path / "whole")
    best, last = best_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "whole")[0].folder
    assert (best.name, last.name) == ("step-000001", "step-000003")

    before = tmp_path / "before"
    before.mkdir()
    if KILLS != "all":
        train_three_steps(before, last_step=2)
        assert last_checkpoint(before)[0].step == 2
    run_dir = shutil.copytree(before, tmp_path / "killed")
    code, done = run_until(0, train_three_steps, run_dir)
    assert code == 0
    assert len(done) > 40
    gone_on_from = []
    for kill_at in range(1, len(done) + 1):
        shutil.rmtree(run_dir)
        shutil.copytree(before, run_dir)
        assert run_until(kill_at, train_three_steps, run_dir) == (-9, None)
        left = {name: content for name, content in tree_of(run_dir).items() if ".part/" not in name}
        if left in gone_on_from:
            continue
        gone_on_from.append(left)
        train_three_steps(run_dir)
        assert tree_of(run_dir) == whole, f"killed before operation {kill_at}: {done[kill_at - 1]}"


def test_what_is_half_written_is_removed(run_until, tmp_path):
    train_three_steps(tmp_path / "run", last_step=2)
    for kill_at in (8, 20, 35):
        assert run_until(kill_at, train_three_steps, tmp_path / "run") == (-9, None)
    assert list((tmp_path / "run" / "checkpoints").glob(".*.part"))
    train_three_steps(tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").glob(".*")) == []


def test_killed_anywhere_in_a_run(run_until, run_file, tmp_path):
    code, done = run_until(0, train_file, tmp_path / "whole", run_file)
    assert code == 0
    whole = {name: content for name, content in tree_of(tmp_path / "whole").items() if "/" in name}
    everywhere = range(1, len(done) + 1)
    chosen = everywhere if KILLS == "all" else sorted(random.Random(5).sample(everywhere, int(KILLS)))
    for kill_at in chosen:
        run_dir = tmp_path / "killed"
        shutil.rmtree(tmp_path / "cache")  # the tokens are made, and killed, anew
        assert run_until(kill_at, train_file, run_dir, run_file) == (-9, None)
        assert run_until(0, train_file, run_dir, run_file)[0] == 0
        after = tree_of(run_dir)
        assert {n: c for n, c in after.items() if "/" in n} == whole, f"before {kill_at}: {done[kill_at - 1]}"
        assert after.keys() == tree_of(tmp_path / "whole").keys()
        shutil.rmtree(run_dir)


def test_nothing_gets_its_name_before_it_is_on_the_disk(run_until, run_file, tmp_path):
    """SIGKILL loses nothing that was written; a power cut loses what was not synced. So: write, sync, rename, sync."""
    _, done = run_until(0, train_file, tmp_path / "run", run_file)
    unsynced = set()
    renamed = 0
    for number, (what, file) in enumerate(done):
        if what in ("open", "save", "half"):
            unsynced.add(file)
        elif what == "fsync":
            unsynced.discard(file)
        elif what == "os.rename" and file.endswith(".part"):
            renamed += 1
            assert not {name for name in unsynced if name == file or name.startswith(f"{file}/")}, file
            folder = os.path.dirname(file)
            assert any(after == ("fsync", folder) for after in done[number:]), f"{folder} after {file}"
    assert renamed > 10


@pytest.mark.parametrize("number", [2, 4])
def test_only_one_of_several_processes_trains(processes, run_file, tmp_path, number):
    from .dying import die_at

    pairs = []
    for _ in range(number):
        receiver, sender = processes.Pipe(duplex=False)
        process = processes.Process(target=die_at, args=(0, sender, train_file, tmp_path / "run", run_file))
        process.start()
        sender.close()
        pairs.append((process, receiver))
    sent = [receiver.recv() for _, receiver in pairs]
    for process, _ in pairs:
        process.join(60)
    refused = [text for text in sent if isinstance(text, str)]
    assert len(refused) == number - 1
    assert all(
        text.startswith("RunError") and "is being trained by another process" in text for text in refused
    )
