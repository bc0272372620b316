"""The copy in the bucket, and the end of the money."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from lorasmith.cloud import keeper
from lorasmith.cloud.keeper import Budget, Mirror, keep
from lorasmith.cloud.quote import SECONDS_AROUND
from lorasmith.files import write_checksums


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "runs" / "faq"
    add_checkpoint(folder, 2)
    (folder / "run.json").write_text("{}")
    (folder / ".lock").write_text("")
    return folder


def add_checkpoint(folder, step):
    checkpoint = folder / "checkpoints" / f"step-{step:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": step}))
    write_checksums(checkpoint)


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_the_copy_follows_the_run(run_dir, tmp_path):
    mirror = Mirror(run_dir, tmp_path / "bucket" / "id")
    assert mirror.update() == []
    assert names(mirror.copy) == [
        "checkpoints/step-000002/SHA256SUMS",
        "checkpoints/step-000002/state.json",
        "run.json",
    ]
    add_checkpoint(run_dir, 4)
    for file in (run_dir / "checkpoints" / "step-000002").iterdir():
        file.unlink()
    (run_dir / "checkpoints" / "step-000002").rmdir()
    (run_dir / "run.json").write_text('{"result": 1}')
    assert mirror.update() == []
    assert [path.name for path in (mirror.copy / "checkpoints").iterdir()] == ["step-000004"]
    assert (mirror.copy / "run.json").read_text() == '{"result": 1}'


def test_what_vouches_is_copied_after_what_it_vouches_for(run_dir, tmp_path, monkeypatch):
    order = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda part, there: (order.append(there.name), replace(part, there)))
    Mirror(run_dir, tmp_path / "bucket" / "id").update()
    assert order == ["state.json", "SHA256SUMS", "run.json"]


def test_a_bucket_that_fails_is_tried_again_and_keeps_what_it_had(run_dir, tmp_path, monkeypatch):
    mirror = Mirror(run_dir, tmp_path / "bucket" / "id")
    mirror.update()
    (run_dir / "run.json").write_text('{"result": 1}')
    (run_dir / "checkpoints" / "step-000002" / "state.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(
            os, "replace", lambda part, there: (_ for _ in ()).throw(OSError(5, "Input/output error"))
        )
        assert mirror.update() == ["run.json: Input/output error"]
    assert (mirror.copy / "checkpoints" / "step-000002" / "state.json").is_file()
    assert mirror.update() == []
    assert (mirror.copy / "run.json").read_text() == '{"result": 1}'


def test_a_new_machine_begins_with_the_copy_and_without_half_checkpoints(run_dir, tmp_path):
    Mirror(run_dir, tmp_path / "bucket" / "id").update()
    half = tmp_path / "bucket" / "id" / "checkpoints" / "step-000004"
    half.mkdir()
    (half / "state.json").write_text("{")
    (run_dir / "of-another-run.txt").write_text("")
    mirror = Mirror(run_dir, tmp_path / "bucket" / "id")
    assert mirror.restore() == mirror.copy
    assert names(run_dir) == [
        "checkpoints/step-000002/SHA256SUMS",
        "checkpoints/step-000002/state.json",
        "run.json",
    ]
    mirror.update()
    assert not half.exists()


def test_what_a_lost_machine_had_half_copied_goes(run_dir, tmp_path):
    """The next machine may make and remove that checkpoint between two copies, and would not touch it again."""
    mirror = Mirror(run_dir, tmp_path / "bucket" / "id")
    mirror.update()
    half = mirror.copy / "checkpoints" / "step-000004"
    half.mkdir()
    (half / ".state.json.part").write_text("{")
    mirror = Mirror(run_dir, mirror.copy)
    mirror.restore()
    assert not half.exists()
    assert names(mirror.copy) == names(run_dir)
    assert mirror.update() == []


def test_a_checkpoint_that_vanishes_while_it_is_copied_leaves_no_folder(run_dir, tmp_path, monkeypatch):
    mirror = Mirror(run_dir, tmp_path / "bucket" / "id")
    mirror.update()
    add_checkpoint(run_dir, 4)

    def stamp(file):
        found = file.stat()
        if "step-000004" in file.parts:
            shutil.rmtree(file.parent)
        return found.st_mtime_ns, found.st_size

    monkeypatch.setattr(keeper, "_stamp", stamp)
    assert mirror.update() == []
    assert [path.name for path in (mirror.copy / "checkpoints").iterdir()] == ["step-000002"]


def test_a_run_that_is_launched_again_takes_the_furthest_copy(run_dir, tmp_path):
    for name, steps in (("first", (4, 6)), ("second", (4,))):
        copy = Mirror(run_dir, tmp_path / "bucket" / name)
        copy.update()
        for step in steps:
            add_checkpoint(copy.copy, step)
    mirror = Mirror(run_dir, tmp_path / "bucket" / "third")
    assert mirror.restore() == tmp_path / "bucket" / "first"
    assert (run_dir / "checkpoints" / "step-000006").is_dir()
    mirror.update()
    assert names(mirror.copy) == names(tmp_path / "bucket" / "first")


def test_without_a_copy_the_run_begins_anew(tmp_path):
    assert Mirror(tmp_path / "runs" / "faq", tmp_path / "bucket" / "id").restore() is None


def test_all_machines_count_against_the_budget(tmp_path):
    now = time.time()
    first = Budget(10_000, tmp_path / ".spent", now - 3_000)
    first.write()
    second = Budget(10_000, tmp_path / ".spent", now - 1_000)
    second.write()
    assert second.seconds_left() == pytest.approx(10_000 - 3_000 - 1_000 - 2 * SECONDS_AROUND, abs=5)
    again = Budget(10_000, tmp_path / ".spent", now - 1_000)  # the job started twice on one machine
    assert again.seconds_left() == pytest.approx(second.seconds_left(), abs=5)


def test_the_command_is_ended_politely_when_the_money_is_gone(run_dir, tmp_path, capfd):
    mirror = Mirror(run_dir, tmp_path / "bucket" / "id")
    budget = Budget(SECONDS_AROUND + 1_000, mirror.copy / ".spent", time.time() - 999)
    saving = f"trap 'echo last > {run_dir}/saved.txt; exit 3' TERM; mkdir -p {run_dir}; sleep 60 & wait"
    assert keep(mirror, budget, 0, 0.05, ["bash", "-c", saving]) == 4
    assert (mirror.copy / "saved.txt").read_text() == "last\n"
    assert (
        "The budget (--max-cost) is gone. What was trained so far is in the bucket." in capfd.readouterr().out
    )
    assert budget.seconds_left() <= 0
    assert keep(mirror, budget, 0, 0.05, ["bash", "-c", f"touch {tmp_path}/started"]) == 4
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize(("command", "code"), [("exit 0", 0), ("exit 7", 7), ("kill -KILL $$", 137)])
def test_the_exit_code_is_that_of_the_command(tmp_path, command, code):
    mirror = Mirror(tmp_path / "faq", tmp_path / "bucket" / "id")
    assert keep(mirror, None, 0, 0.05, ["bash", "-c", command]) == code


def test_the_run_folder_and_its_copy_are_the_first_machines(run_dir, tmp_path):
    mirror = Mirror(run_dir, tmp_path / "bucket" / "id")
    mirror.update()
    other = Mirror(tmp_path / "other" / "faq", mirror.copy)
    before = names(mirror.copy)
    assert keep(other, None, 1, 0.05, ["mkdir", "-p", f"{other.run_dir}/new"]) == 0
    assert names(other.run_dir) == []
    assert names(mirror.copy) == before


def test_a_bucket_that_never_answers_ends_the_job_with_a_fault(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lorasmith.cloud.keeper._LAST_TRIES", 2)
    (tmp_path / "bucket").write_text("not a folder")
    mirror = Mirror(run_dir, tmp_path / "bucket" / "id")
    assert keep(mirror, None, 0, 0.05, ["bash", "-c", f"mkdir -p {run_dir}; touch {run_dir}/run.json"]) == 5
    assert capsys.readouterr().out.endswith("The last state of the run is not in the bucket.\n")


def test_it_needs_neither_torch_nor_training(tmp_path):
    code = "import sys, lorasmith.cloud.keeper as _; print({'torch', 'peft', 'lorasmith.training'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"
