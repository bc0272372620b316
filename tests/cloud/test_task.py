"""The task as values, and the folder that is uploaded with it."""

import json
from importlib import metadata

import pytest
import yaml

from lorasmith.cli import run_file
from lorasmith.cli.run_file import load_run_file
from lorasmith.cloud import workdir
from lorasmith.cloud.task import Bucket, make_task
from lorasmith.cloud.workdir import constraints, fill_workdir, requirements
from lorasmith.errors import SettingsError


def test_only_what_was_quoted_may_be_rented(make_launch, make_quote):
    quotes = [make_quote(), make_quote(gpu="H100", cloud="gcp", region="us-central1", spot=True)]
    task = make_task(make_launch(), quotes, "/workdir")
    first, second = task["resources"]["any_of"]
    assert (first["infra"], first["accelerators"], first["use_spot"]) == ("aws/us-east-1", "L4:1", False)
    assert (second["infra"], second["accelerators"], second["use_spot"]) == (
        "gcp/us-central1",
        "H100:1",
        True,
    )
    for resources in (first, second):
        assert resources["autostop"] == {"idle_minutes": 10, "down": True}
        assert resources["job_recovery"] == {"strategy": "EAGER_NEXT_REGION", "max_restarts_on_errors": 0}
    (only,) = (make_task(make_launch(), quotes[:1], "/workdir")["resources"],)
    assert only == first


def test_the_copy_goes_to_the_bucket_in_the_background(make_launch, make_quote):
    task = make_task(make_launch(bucket=Bucket("gs", "team")), [make_quote()], "/workdir")
    assert task["file_mounts"] == {"/outputs": {"name": "team", "store": "gcs", "mode": "MOUNT_CACHED"}}
    assert '--copy "/outputs/$LORASMITH_RUN/$SKYPILOT_TASK_ID"' in task["run"]
    assert task["envs"] == {"LORASMITH_RUN": "faq", "LORASMITH_BUDGET_SECONDS": ""}


def test_secrets_are_named_and_not_told(make_launch, make_quote, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    task = make_task(make_launch(secrets=("HF_TOKEN",)), [make_quote()], "/workdir")
    assert task["secrets"] == {"HF_TOKEN": None}
    assert "hf_very_secret" not in json.dumps(task)
    assert "secrets" not in make_task(make_launch(), [make_quote()], "/workdir")


def test_a_server_has_a_port_and_is_not_moved(make_launch, make_quote):
    task = make_task(make_launch(serve_port=8000, budget_seconds=7200.0), [make_quote()], "/workdir")
    assert task["resources"]["ports"] == 8000
    assert "job_recovery" not in task["resources"]
    assert task["envs"]["LORASMITH_BUDGET_SECONDS"] == 7200
    assert "--host 0.0.0.0 --port 8000" in task["run"]


@pytest.mark.parametrize("name", ["Faq.v1", "faq_v1", "faq-v1_."])
def test_a_job_is_called_as_skypilot_calls_machines(make_launch, name):
    assert make_launch(name=name).job == "lorasmith-faq-v1"


@pytest.mark.parametrize("url", ["team", "s3://", "s3://team/folder", "azure://team", "https://team"])
def test_a_bucket_is_a_bucket(url):
    with pytest.raises(SettingsError, match="a bucket is named s3://NAME or gs://NAME, without a folder"):
        Bucket.parse(url)


def fill(folder, *words):
    folder.mkdir(exist_ok=True)
    fill_workdir(folder, load_run_file(None, list(words), {}).model_dump(mode="json"), ("parquet",))
    return yaml.safe_load((folder / "run.yaml").read_text())


def test_what_the_run_file_names_goes_along(tmp_path, tiny_base_folder):
    (tmp_path / "rows.json").write_text("[]")
    found = fill(
        tmp_path / "workdir",
        f"data.train={tmp_path / 'rows.json'}",
        f"base.model={tiny_base_folder}",
        f"run.root={tmp_path}",
        "run.name=faq",
    )
    workdir = tmp_path / "workdir"
    assert (workdir / found["data"]["train"]).read_text() == "[]"
    assert (workdir / found["base"]["model"] / "config.json").is_file()
    assert (workdir / "lorasmith" / "cloud" / "keeper.py").is_file()
    assert "name" not in found["run"]
    assert "root" not in found["run"]
    assert not list(workdir.rglob("__pycache__"))


def test_names_that_are_no_files_stay(tmp_path, monkeypatch):
    for name in ("smollm2-135m", "text"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    more = ("base.model=smollm2-135m", "prompt.recipe=text", "objective.name=text")
    found = fill(tmp_path / "workdir", "data.train=team/rows", *more)
    assert found["data"]["train"] == "team/rows"
    assert found["base"]["model"] == "smollm2-135m"
    assert found["prompt"]["recipe"] == "text"


def test_files_of_one_name_go_along_side_by_side(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for team in ("sales", "support", "text"):
        (tmp_path / team / "more").mkdir(parents=True)
        (tmp_path / team / "rows.json").write_text(f'["{team}"]')
        (tmp_path / team / "more" / "rows.json").write_text(f'["more of {team}"]')
    sources = '["sales/rows.json", "support/rows.json", "sales/more", "support/more"]'
    found = fill(tmp_path / "workdir", "data.train=text", f"report.data={sources}")
    files = [tmp_path / "workdir" / name for name in (*found["report"]["data"], found["data"]["train"])]
    told = [(path / "rows.json" if path.is_dir() else path).read_text() for path in files]
    assert told == ['["sales"]', '["support"]', '["more of sales"]', '["more of support"]', '["text"]']


def test_a_folder_that_git_ignores_is_uploaded(tmp_path):
    (tmp_path / "rows" / ".git").mkdir(parents=True)
    (tmp_path / "rows" / ".gitignore").write_text("*\n")
    (tmp_path / "rows" / "rows.json").write_text("[]")
    found = fill(tmp_path / "workdir", f"data.train={tmp_path / 'rows'}")
    uploaded = tmp_path / "workdir" / found["data"]["train"]
    assert [path.name for path in uploaded.iterdir()] == ["rows.json"]


def test_what_may_be_a_path_is_what_a_run_file_says_it_is():
    words = {word for words in workdir._WORDS.values() for word in words}
    assert (set(workdir._PATHS), words) == (run_file._PATHS, run_file._NAMES)


def test_what_is_right_only_here_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"data.train is /gone/rows.json, which is not on this machine"):
        fill(tmp_path / "one", "data.train=/gone/rows.json")
    with pytest.raises(SettingsError, match=r"base.device is cpu, which a rented GPU is not"):
        fill(tmp_path / "two", "data.train=team/rows", "base.device=cpu")


def test_the_versions_are_those_of_here(tmp_path):
    fill(tmp_path / "workdir", "data.train=team/rows")
    pinned = (tmp_path / "workdir" / "constraints.txt").read_text().splitlines()
    assert f"peft=={metadata.version('peft')}" in pinned == constraints()
    assert not [line for line in pinned if "+" in line or line.startswith("lorasmith")]
    needed = (tmp_path / "workdir" / "requirements.txt").read_text().splitlines()
    assert needed == requirements(("parquet",))
    assert any(line.startswith("pyarrow") for line in needed)
    assert not any(line.startswith("pyarrow") for line in requirements(()))
