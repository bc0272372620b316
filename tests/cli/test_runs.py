"""runs: one line a run, newest first; broken ones are shown, not hidden."""

import json

import pytest
from filelock import FileLock

from lorasmith.cli.runs import command
from lorasmith.model.base import BaseRef
from lorasmith.model.run_record import LOCK, RunRecord, write_run_record


def write_run(folder, created, result=None, base="owner/model"):
    record = RunRecord(
        name=folder.name,
        created=created,
        base=BaseRef(base, None, "f" * 64),
        recipe={"name": "chat"},
        settings={},
        data={"source": "/somewhere/deep/faq.json", "num_examples": 1234},
        result=result,
    )
    write_run_record(folder, record)


@pytest.fixture
def root(tmp_path):
    write_run(tmp_path / "old", "2026-01-01T00:00:00+00:00", {"final_loss": 0.12345})
    write_run(tmp_path / "group" / "new", "2026-03-01T00:00:00+00:00")
    write_run(tmp_path / "halted", "2026-02-01T00:00:00+00:00")
    (tmp_path / "halted" / "checkpoints" / "step-5").mkdir(parents=True)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    return tmp_path


def test_json_lists_every_run_newest_first(root, capsys):
    command(root, as_json=True)
    runs = json.loads(capsys.readouterr().out)
    assert [run["folder"].rsplit("/", 1)[1] for run in runs] == ["new", "halted", "old", "broken"]
    assert [run["state"] for run in runs] == ["started", "stopped", "finished", "broken"]
    assert runs[2]["final_loss"] == 0.12345
    assert "cannot be read" in runs[3]["fault"]


def test_the_table_is_short_and_names_the_fault(root, capsys, monkeypatch):
    from lorasmith.cli import runs

    monkeypatch.setattr(runs.console, "width", 200)
    command(root)
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if "finished" in line)
    assert line.split() == [
        f"{root}/old",
        "owner/model",
        "faq.json",
        "1,234",
        "0.123",
        "2026-01-01",
        "finished",
    ]
    assert "run.json cannot be read" in printed


@pytest.mark.parametrize("folder", ["", "nothing-here"])
def test_no_runs_is_no_error_and_says_how_to_make_one(tmp_path, capsys, folder):
    command(tmp_path / folder)
    assert "lorasmith demo" in capsys.readouterr().out
    command(tmp_path / folder, as_json=True)
    assert json.loads(capsys.readouterr().out) == []


def test_a_run_that_is_being_trained_is_not_called_stopped(root, capsys):
    with FileLock(root / "halted" / LOCK):
        command(root, as_json=True)
    states = {run["name"]: run["state"] for run in json.loads(capsys.readouterr().out) if "name" in run}
    assert states["halted"] == "training"
