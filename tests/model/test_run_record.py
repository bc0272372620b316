"""run.json: read back as written, refused when damaged, listed newest first."""

import json

import pytest

from lorasmith.errors import RunError
from lorasmith.model.base import BaseRef
from lorasmith.model.run_record import RunRecord, list_runs, read_run_record, write_run_record


def record(name="faq", **changes):
    values = {
        "name": name,
        "base": BaseRef("owner/model", "c0ffee", "f" * 64),
        "recipe": {"name": "chat", "stop": []},
        "settings": {"training": {"epochs": 3}},
        "data": {"source": "faq.json", "num_examples": 7},
    }
    return RunRecord(**(values | changes))


def test_round_trip(tmp_path):
    original = record(result={"final_loss": 0.5})
    write_run_record(tmp_path / "run", original)
    assert read_run_record(tmp_path / "run") == original
    assert original.versions.keys() >= {"python", "torch", "transformers", "peft", "lorasmith"}
    assert original.created.endswith("+00:00")


def test_a_record_does_not_change():
    with pytest.raises(ValueError, match="frozen"):
        record().name = "other"


def test_what_is_no_run_is_told_apart(tmp_path):
    (tmp_path / "adapter_config.json").touch()
    for folder, text in (
        (tmp_path / "gone", "is not there"),
        (tmp_path, "an adapter folder without a run.json"),
    ):
        with pytest.raises(RunError, match=text):
            read_run_record(folder)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda fields: fields.pop("base"), "base: Field required"),
        (lambda fields: fields.update(schema_version=9), "has schema_version 9, and this lorasmith reads 1"),
        (lambda fields: fields.update(extra=1), "extra"),
    ],
)
def test_a_damaged_record_is_refused_with_the_place(tmp_path, damage, text):
    write_run_record(tmp_path, record())
    fields = json.loads((tmp_path / "run.json").read_text())
    damage(fields)
    (tmp_path / "run.json").write_text(json.dumps(fields))
    with pytest.raises(RunError, match=text):
        read_run_record(tmp_path)


def test_runs_are_listed_newest_first_and_broken_ones_last(tmp_path):
    for name, created in (("a", "2026-01-01"), ("group/b", "2026-03-01"), ("c", "2026-02-01")):
        write_run_record(tmp_path / name, record(name, created=created))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "run.json").write_text("[]")
    (tmp_path / "not-a-run").mkdir()
    found = list_runs(tmp_path)
    assert [folder.name for folder, _ in found] == ["b", "c", "a", "d"]
    assert isinstance(found[-1][1], RunError)


def test_a_missing_root_is_told(tmp_path):
    with pytest.raises(RunError, match="There is no folder"):
        list_runs(tmp_path / "runs")
