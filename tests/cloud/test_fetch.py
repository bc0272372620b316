"""The way home: what a bucket holds becomes a run folder of here. The cloud's tool is a script that copies a folder."""

import json
import os
import shutil
from dataclasses import replace

import pytest

from lorasmith.cli.run_file import load_run_file, train
from lorasmith.cloud.fetch import fetch
from lorasmith.cloud.records import LaunchRecord, find_record, read_records, write_record
from lorasmith.cloud.workdir import fill_workdir
from lorasmith.errors import CloudError, RunError
from lorasmith.files import write_checksums
from lorasmith.generation.chat import Chat

RECORD = LaunchRecord("faq", "lorasmith-faq", True, "s3://team", "2026-11-25T20:00:00+00:00", None)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A folder that ``aws s3 sync s3://team/faq FOLDER`` copies from."""
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "aws"
    tool.write_text(
        f'#!/bin/sh\n[ "$1 $2 $3" = "s3 sync s3://team/faq" ] || {{ echo "NoSuchBucket: $3" >&2; exit 1; }}\n'
        f'cp -rp {tmp_path}/bucket/. "$4"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin")
    (tmp_path / "bucket").mkdir()
    return tmp_path / "bucket"


def test_a_finished_run_comes_home_and_is_asked(bucket, tmp_path, trained_run, tiny_base_folder):
    copy = bucket / "task-1"
    shutil.copytree(trained_run, copy)
    (copy / ".spent").mkdir()
    record = json.loads((copy / "run.json").read_text())
    record["base"]["id"] = "/home/sky/sky_workdir/base.model/tiny"
    (copy / "run.json").write_text(json.dumps(record))
    (bucket / "task-0" / "checkpoints" / "step-000002").mkdir(parents=True)
    (bucket / "task-0" / "run.json").write_text(json.dumps(record | {"result": None}))

    run_dir = fetch(replace(RECORD, base=str(tiny_base_folder)), tmp_path / "runs")
    assert run_dir == tmp_path / "runs" / "faq"
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["faq"]
    assert not (run_dir / ".spent").exists()
    here, there = (Chat.from_run(folder, device="cpu") for folder in (run_dir, trained_run))
    question = "What is 3 plus 3?"
    assert here.ask(question).text == there.ask(question).text


def test_a_stopped_run_is_gone_on_with_here(bucket, tmp_path, tiny_base_folder, training_rows, monkeypatch):
    (tmp_path / "rows.json").write_text(json.dumps(training_rows))
    words = [f"base.model={tiny_base_folder}", f"data.train={tmp_path / 'rows.json'}", "base.dtype=float32"]
    words += ["training.batch_size=4", "training.save_every=2", "report.after_training=false"]
    run_file = load_run_file(None, words, {})
    workdir = tmp_path / "workdir"
    workdir.mkdir()
    fill_workdir(workdir, run_file.model_dump(mode="json", exclude_defaults=True), ())
    monkeypatch.chdir(workdir)
    steps = train(load_run_file("run.yaml", [], {}), bucket / "task-1")
    for step in steps:
        if step.step == 4:
            break
    steps.close()
    shutil.rmtree(workdir)
    monkeypatch.chdir(tmp_path)
    run_dir = fetch(replace(RECORD, base=str(tiny_base_folder)), tmp_path / "runs")
    went_on = [step.step for step in train(run_file, run_dir)]
    assert went_on[0] > 1
    assert json.loads((run_dir / "run.json").read_text())["result"]["steps"] == went_on[-1]


def test_an_unfinished_run_comes_without_what_is_not_whole(bucket, tmp_path):
    copy = bucket / "task-1"
    for step in (2, 4):
        checkpoint = copy / "checkpoints" / f"step-{step:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text("{}")
    write_checksums(copy / "checkpoints" / "step-000002")
    (copy / "adapter").mkdir()
    (copy / "run.json").write_text('{"result": null}')
    run_dir = fetch(RECORD, tmp_path / "runs")
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-000002"]
    assert not (run_dir / "adapter").exists()


def test_of_two_unfinished_copies_the_one_that_is_further_comes(bucket, tmp_path):
    for task, step, written in (("task-1", 4, 2_000), ("task-2", 12, 1_000)):
        checkpoint = bucket / task / "checkpoints" / f"step-{step:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text("{}")
        write_checksums(checkpoint)
        (bucket / task / "run.json").write_text('{"result": null}')
        os.utime(bucket / task / "run.json", (written, written))  # a cloud's tool may not keep this
    run_dir = fetch(RECORD, tmp_path / "runs")
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-000012"]


def test_a_finished_adapter_that_is_not_whole_is_refused(bucket, tmp_path):
    adapter = bucket / "task-1" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"half")
    (bucket / "task-1" / "run.json").write_text('{"result": {"steps": 4}}')
    with pytest.raises(CloudError, match=r"not whole: SHA256SUMS cannot be read .* fetch again in a minute"):
        fetch(RECORD, tmp_path / "runs")
    assert list((tmp_path / "runs").iterdir()) == []


def test_what_cannot_be_fetched_is_said(bucket, tmp_path, monkeypatch):
    with pytest.raises(RunError, match=r"s3://team/faq has no run yet\. See: lorasmith launch status"):
        fetch(RECORD, tmp_path / "runs")
    with pytest.raises(CloudError, match=r"aws s3 sync s3://gone/faq failed:\nNoSuchBucket: s3://gone/faq"):
        fetch(replace(RECORD, bucket="s3://gone"), tmp_path / "runs")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(CloudError, match=r"gs://team/faq needs gcloud, which is not installed: https://"):
        fetch(replace(RECORD, bucket="gs://team"), tmp_path / "runs")
    (tmp_path / "runs" / "faq").mkdir()
    with pytest.raises(RunError, match=r"faq is there already. Move it away"):
        fetch(RECORD, tmp_path / "runs")


def test_a_launch_is_found_by_its_name(tmp_path):
    with pytest.raises(RunError, match=r"Which launch.* Launches of .*: none"):
        find_record(tmp_path, None)
    write_record(tmp_path, RECORD)
    assert find_record(tmp_path, None) == find_record(tmp_path, "faq") == RECORD
    later = replace(RECORD, name="sales", launched="2026-11-26T20:00:00+00:00")
    write_record(tmp_path, later)
    assert read_records(tmp_path) == [later, RECORD]
    with pytest.raises(RunError, match=r"Which launch.* sales, faq"):
        find_record(tmp_path, None)
    with pytest.raises(RunError, match="Nothing called other was launched from here"):
        find_record(tmp_path, "other")
