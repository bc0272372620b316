"""``lorasmith launch`` up to SkyPilot's door: a script stands there that answers as told and notes what it is asked.

What SkyPilot itself says to the task is in tests/cloud/test_skypilot.py.
"""

import json
import shutil
import sys

import pytest
import yaml
from typer.testing import CliRunner

from lorasmith.cli import main
from lorasmith.cli.launch import _extras
from lorasmith.cli.run_file import load_run_file
from lorasmith.cloud.records import read_records
from lorasmith.errors import CloudError, LorasmithError, RunError, SettingsError

PYTHON = """#!{python}
import json, pathlib, sys
here = pathlib.Path("{folder}")
question, verb = json.load(sys.stdin), sys.argv[2]
with (here / "asked.jsonl").open("a") as log:
    log.write(json.dumps([verb, question]) + "\\n")
answers = json.loads((here / "answers.json").read_text())
if verb not in answers:
    sys.exit("sky.exceptions.ResourcesUnavailableError: " + verb)
json.dump(answers[verb], sys.stdout)
"""
SKY = '#!/bin/sh\necho "$@" >> {folder}/sky.log\nexit 7\n'


def offer(cloud, region, hourly, gpu="L4", spot=False, num=1):
    return {"cloud": cloud, "region": region, "gpu": gpu, "num_gpus": num, "hourly": hourly, "spot": spot}


ANSWERS = {
    "clouds": {"aws": [], "gcp": []},
    "offers": [
        offer("gcp", "us-central1", 0.71),
        offer("aws", "us-east-1", 0.8),
        offer("aws", "eu-west-1", 0.9),
        offer("aws", "ap-south-1", 4.4, "H100"),
    ],
    "check": "Considered resources (1 node): L4",
    "launch": None,
    "knows": True,
}


class Sky:
    def __init__(self, folder):
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        for name, text in (("python", PYTHON), ("sky", SKY)):
            (folder / "bin" / name).write_text(text.format(python=sys.executable, folder=folder))
            (folder / "bin" / name).chmod(0o755)
        self.answer(**ANSWERS)

    def answer(self, **answers):
        (self.folder / "answers.json").write_text(json.dumps(answers))

    @property
    def asked(self):
        lines = (self.folder / "asked.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def told(self):
        return (self.folder / "sky.log").read_text().splitlines()


@pytest.fixture
def sky(tmp_path, monkeypatch):
    monkeypatch.setenv("LORASMITH_SKY", str(tmp_path / "sky"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return Sky(tmp_path / "sky")


@pytest.fixture
def launch(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*words, answer=None):
        words = ("launch", *words)
        monkeypatch.setattr("sys.argv", ["lorasmith", *words])
        result = CliRunner(env={"COLUMNS": "200"}).invoke(main.app, list(words), input=answer)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def words(tmp_path, tiny_base_folder):
    rows = [{"instruction": f"What is number {i}?", "output": f"It is the {i * 7}th."} for i in range(24)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return (f"base.model={tiny_base_folder}", "data.train=rows.json", "run.name=faq")


def test_a_dry_run_quotes_the_three_cheapest_and_prints_the_task(launch, words, sky, tmp_path):
    result = launch(*words, "--gpu", "L4:1", "--gpu", "H100", "--max-cost", "5", "--dry-run")
    assert result.exit_code == 0
    before, _, task = result.output.partition("The task:\n")
    rows = [line.split() for line in before.splitlines() if line.startswith("L4:1")]
    assert [(row[1], row[2]) for row in rows] == [
        ("gcp/us-central1", "$0.71"),
        ("aws/us-east-1", "$0.80"),
        ("aws/eu-west-1", "$0.90"),
    ]
    assert "Bucket: gs://lorasmith-" in before
    assert "--max-cost $5: at the dearest of these prices 5.6 hours of rent" in before
    assert "Considered resources (1 node): L4\n\nNothing was rented." in before
    task = yaml.safe_load(task)
    assert [one["infra"] for one in task["resources"]["any_of"]] == [row[1] for row in rows]
    assert task["envs"]["LORASMITH_BUDGET_SECONDS"] == 20000
    assert "run: |\n  set -euo pipefail\n" in result.output
    assert [verb for verb, _ in sky.asked] == ["clouds", "offers", "check"]
    assert sky.asked[0][1] == {"needs": ["storage_mounting", "autodown"]}
    assert sky.asked[1][1] == {"machines": ["L4:1", "H100:1"], "clouds": ["aws", "gcp"], "spot": False}
    assert not (tmp_path / "runs").exists()


def test_money_is_spent_after_a_yes_only(launch, words, sky, tmp_path, monkeypatch):
    with pytest.raises(SettingsError, match=r"Nobody can be asked .* Say --yes"):
        launch(*words, "--gpu", "L4:1")
    assert [verb for verb, _ in sky.asked] == ["clouds", "offers"]
    assert not read_records(tmp_path / "runs")

    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    result = launch(*words, "--gpu", "L4:1", "--cloud", "aws", "--yes")
    assert result.exit_code == 0
    assert "Launched faq. Next: lorasmith launch status | logs | down | fetch faq" in result.output
    verb, question = sky.asked[-1]
    assert verb == "launch"
    assert (question["name"], question["managed"]) == ("lorasmith-faq", True)
    assert question["task"]["secrets"] == {"HF_TOKEN": None}
    assert "hf_very_secret" not in (sky.folder / "asked.jsonl").read_text()
    (record,) = read_records(tmp_path / "runs")
    assert (record.name, record.job, record.managed) == ("faq", "lorasmith-faq", True)
    assert record.base == words[0].partition("=")[2]

    with pytest.raises(RunError, match=r"faq was launched from here before.*--resume.*run.name=NAME"):
        launch(*words, "--gpu", "L4:1", "--yes")
    assert launch(*words, "--gpu", "L4:1", "--yes", "--resume").exit_code == 0


def test_a_resumed_launch_keeps_its_bucket_where_another_cloud_has_become_cheaper(
    launch, words, sky, tmp_path
):
    launch(*words, "--gpu", "L4:1", "--yes")
    (before,) = read_records(tmp_path / "runs")
    assert before.bucket.startswith("gs://")
    sky.answer(**ANSWERS | {"offers": [offer("aws", "us-east-1", 0.3)]})
    launch(*words, "--gpu", "L4:1", "--yes", "--resume")
    assert sky.asked[-1][1]["task"]["file_mounts"]["/outputs"]["store"] == "gcs"
    (after,) = read_records(tmp_path / "runs")
    assert after.bucket == before.bucket

    num_asked = len(sky.asked)
    with pytest.raises(
        SettingsError, match=rf"--bucket s3://new: faq is kept in {before.bucket}, .*Leave --bucket"
    ):
        launch(*words, "--gpu", "L4:1", "--yes", "--resume", "--bucket", "s3://new")
    assert len(sky.asked) == num_asked
    launch(*words, "--gpu", "L4:1", "--yes", "--resume", "--bucket", f"{before.bucket}/")


def test_a_launch_that_came_to_nothing_is_forgotten(launch, words, sky, tmp_path, tiny_base_folder):
    shutil.copytree(tiny_base_folder, tmp_path / "elsewhere")
    told = (*words, "--gpu", "L4:1", "--yes")
    refused = {verb: answer for verb, answer in ANSWERS.items() if verb != "launch"}
    for knows, is_kept in ((False, False), (True, True)):
        sky.answer(**refused | {"knows": knows})
        with pytest.raises(CloudError, match="SkyPilot failed; what it says stands above"):
            launch(*told)
        assert sky.asked[-1] == ["knows", {"name": "lorasmith-faq", "managed": True}]
        assert len(read_records(tmp_path / "runs")) == is_kept
    (before,) = read_records(tmp_path / "runs")
    sky.answer(**refused | {"knows": False})
    with pytest.raises(CloudError):  # the earlier launch is not forgotten for it
        launch(*told[1:], "base.model=elsewhere", "--resume")
    assert read_records(tmp_path / "runs") == [before]
    (tmp_path / "runs" / ".launches" / "faq.json").unlink()
    del refused["knows"]
    sky.answer(**refused)
    with pytest.raises(CloudError):  # SkyPilot itself does not answer: it may have begun
        launch(*told)
    assert len(read_records(tmp_path / "runs")) == 1


def test_two_runs_are_not_one_job(launch, words, sky, tmp_path):
    launch(*words[:2], "run.name=Faq.v_1", "--gpu", "L4:1", "--yes")
    for name in ("faq.v_1", "Faq-v-1"):
        with pytest.raises(RunError, match=rf"Faq.v_1, .* and {name} are both lorasmith-faq-v-1 to SkyPilot"):
            launch(*words[:2], f"run.name={name}", "--gpu", "L4:1", "--yes")
    assert [record.name for record in read_records(tmp_path / "runs")] == ["Faq.v_1"]


def test_clouds_that_cannot_do_it_are_left_out(launch, words, sky, monkeypatch):
    monkeypatch.setenv("LORASMITH_API_KEYS", "sk-very-secret-key")
    sky.answer(**ANSWERS | {"clouds": {"aws": [], "mithril": ["open_ports"], "runpod": ["storage_mounting"]}})
    serve = (*words, "--gpu", "L4:1", "--serve", "--max-cost", "4", "--bucket", "s3://team", "--dry-run")
    said = launch(*serve).output
    assert "Left out, since SkyPilot cannot do there what this launch needs" in said
    assert "mithril (no open ports); runpod (no mounted buckets)." in " ".join(said.split())
    assert sky.asked[0][1] == {"needs": ["storage_mounting", "autodown", "open_ports"]}
    assert sky.asked[1][1]["clouds"] == ["aws"]
    with pytest.raises(
        SettingsError, match=r"cannot do what .* mithril \(no open ports\)\. Name another --cloud"
    ):
        launch(*serve, "--cloud", "mithril")
    sky.answer(**ANSWERS | {"clouds": {"vast": ["storage_mounting", "multi-node"]}})
    with pytest.raises(SettingsError, match=r"vast \(no mounted buckets and no runs on several machines\)"):
        launch(*words, "--gpu", "L4:1", "--nodes", "2", "--dry-run")
    assert sky.asked[-1][1] == {"needs": ["storage_mounting", "autodown", "multi-node"]}


def test_what_loads_a_sharded_base_whole_is_refused_where_it_does_not_fit(
    launch, words, sky, tmp_path, tiny_base_folder, monkeypatch
):
    """16 layers of 855 million weights: 25.5 GiB in bfloat16, 6.4 and two layers of 1.6 in each of four processes."""
    wide = tmp_path / "wide"
    shutil.copytree(tiny_base_folder, wide, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((wide / "config.json").read_text())
    config |= {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 16}
    config |= {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}
    (wide / "config.json").write_text(json.dumps(config))
    offers = [
        offer("aws", "us-east-1", 5.0, "L4", num=4),
        offer("aws", "us-east-1", 20.0, "A100-80GB", num=4),
    ]
    sky.answer(**ANSWERS | {"offers": offers})
    sharded = (f"base.model={wide}", *words[1:], "engine.shard_base=true", "--dry-run")
    with pytest.raises(
        SettingsError, match=r"fits L4:4, but the report .* Leave the report out: report.after_training=false"
    ):
        launch(*sharded, "--gpu", "L4:4")
    assert "$5.00" in launch(*sharded, "--gpu", "L4:4", "report.after_training=false").output
    said = launch(*sharded, "--gpu", "L4:4", "--gpu", "A100-80GB:4").output
    assert "Left out: With its base sharded the run fits L4:4, but the report after training" in said
    assert "$5.00" not in said
    assert "$20.00" in said
    monkeypatch.setenv("LORASMITH_API_KEYS", "sk-very-secret-key")
    serve = (*sharded, "report.after_training=false", "--serve", "--max-cost", "9")
    with pytest.raises(SettingsError, match=r"fits L4:4, but --serve loads .* Leave --serve out"):
        launch(*serve, "--gpu", "L4:4")


def test_a_launch_is_looked_after_by_sky(launch, words, sky):
    launch(*words, "--gpu", "L4:1", "--yes")
    status = launch("status")
    assert "job lorasmith-faq" in status.output
    assert launch("logs").exit_code == 7
    launch("down", "faq")
    assert sky.told == [
        "status",
        "jobs queue",
        "jobs logs --name lorasmith-faq",
        "jobs cancel --name lorasmith-faq --yes",
    ]
    with pytest.raises(RunError, match="Nothing called other was launched from here"):
        launch("down", "other")
    with pytest.raises(SettingsError, match="launch down takes one name, not 2"):
        launch("down", "one", "two")
    with pytest.raises(SettingsError, match="launch status takes no name"):
        launch("status", "faq")
    with pytest.raises(RunError, match="Nothing was launched from elsewhere"):
        launch("status", "--root", "elsewhere")


def test_a_server_is_a_machine_that_ends_with_the_money(launch, words, sky, monkeypatch):
    monkeypatch.setenv("LORASMITH_API_KEYS", "sk-very-secret-key")
    said = launch(*words, "--gpu", "L4:1", "--serve", "--max-cost", "4", "--yes").output
    assert "It serves until then; lorasmith launch down faq ends it earlier." in " ".join(said.split())
    assert "the serving, which takes the rest of --max-cost" in " ".join(said.split())
    _, question = sky.asked[-1]
    assert question["managed"] is False
    assert question["task"]["secrets"] == {"LORASMITH_API_KEYS": None}
    assert question["task"]["resources"]["any_of"][0]["ports"] == 8000
    assert f"{sky.folder}/bin/sky status lorasmith-faq --endpoint 8000\n" in said
    launch("logs")
    launch("down")
    assert sky.told == ["logs lorasmith-faq", "down lorasmith-faq --yes"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            ("fetch", "faq", "--bucket", "s3://b", "--spot"),
            "--spot and --bucket would be ignored beside launch fetch",
        ),
        (("status", "--nodes", "2"), "--nodes would be ignored beside launch status"),
        (("--install", "--root", "elsewhere"), "--root would be ignored beside --install"),
        (("run.yaml", "--install"), "--install launches nothing"),
    ],
)
def test_options_of_a_launch_belong_to_a_launch(launch, asked, said):
    with pytest.raises(SettingsError, match=said):
        launch(*asked)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--cloud", "azure"), r"--cloud azure: SkyPilot has credentials for aws, gcp\. .*sky check azure"),
        (("--gpu", "L5"), "L5"),
        (("--max-cost", "0.1"), "rents the dearest .* for 7 minutes, of which .* about 10. Allow more"),
        (("--secret", "NO_SUCH"), "--secret NO_SUCH: there is no environment variable of that name"),
        (("--bucket", "s3://team/folder"), "a bucket is named s3://NAME"),
        (("--serve", "--spot"), "Leave --spot and --nodes out"),
        (("--port", "9000"), "--port 9000 is the port of --serve. Add --serve, or leave --port out"),
        (("--serve",), "Say how much rent it may use: --max-cost"),
        (("--root", "elsewhere"), "--root is for status, logs, down and fetch. .* run.root=elsewhere"),
        (("--serve", "--max-cost", "4"), "Put keys into LORASMITH_API_KEYS"),
        (("--resume",), "Nothing called faq was launched from here, so there is nothing to go on with"),
        (("base.device=cpu",), "base.device is cpu, which a rented GPU is not"),
        (('report.data=["gone.json"]',), "gone.json does not exist"),
        (("data.validation=gone.json",), "gone.json does not exist"),
        (
            ("data.validation=rows.json", "training.validation_share=0.2"),
            "are set. Use one: the file, or a share",
        ),
        (("engine.shard_base=true", "method.name=dora"), "engine.shard_base does not go with:"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_rented(launch, words, sky, monkeypatch, more, said):
    monkeypatch.delenv("LORASMITH_API_KEYS", raising=False)
    gpu = () if "--gpu" in more else ("--gpu", "L4:1")
    with pytest.raises(LorasmithError, match=said):
        launch(*words, *gpu, *more, "--yes")
    asked = sky.asked if (sky.folder / "asked.jsonl").exists() else []
    assert "launch" not in [verb for verb, _ in asked]


def test_keys_that_the_server_would_refuse_are_refused_before_it_is_rented(launch, words, sky, monkeypatch):
    monkeypatch.setenv("LORASMITH_API_KEYS", "sk-team")
    with pytest.raises(LorasmithError, match="shorter than 16 characters"):
        launch(*words, "--gpu", "L4:1", "--serve", "--max-cost", "4", "--yes")
    assert not (sky.folder / "asked.jsonl").exists()


def test_parquet_is_found_wherever_in_a_folder_it_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows" / "may").mkdir(parents=True)
    (tmp_path / "rows" / "may" / "1.PARQUET").touch()
    for source, extras in (("~/rows", ["parquet"]), ("team/rows", ["hub-data"])):
        assert _extras(load_run_file(None, [f"data.train={source}"], {}), serve=False) == extras


def test_clouds_without_such_machines_are_named(launch, words, sky):
    sky.answer(**ANSWERS | {"offers": []})
    with pytest.raises(
        SettingsError, match=r"aws, gcp have no spot machine with L4:1 .* or without --spot or --cloud"
    ):
        launch(*words, "--gpu", "L4:1", "--spot")
    sky.answer(**ANSWERS | {"offers": [offer("lambda", "us-east-1", 0.7)]})
    with pytest.raises(SettingsError, match=r"lambda has no bucket of its own .* --bucket s3://NAME"):
        launch(*words, "--gpu", "L4:1")
    sky.answer(**ANSWERS | {"offers": [offer("kubernetes", "team", 0.0)]})
    with pytest.raises(SettingsError, match="--max-cost: these machines cost nothing"):
        launch(*words, "--gpu", "L4:1", "--bucket", "s3://team", "--max-cost", "5")


def test_skypilots_own_words_are_passed_on(launch, words, sky):
    sky.answer(**{verb: answer for verb, answer in ANSWERS.items() if verb != "check"})
    with pytest.raises(
        CloudError, match=r"SkyPilot failed:\nsky.exceptions.ResourcesUnavailableError: check"
    ):
        launch(*words, "--gpu", "L4:1", "--dry-run")
    sky.answer(clouds={})
    with pytest.raises(CloudError, match=r"SkyPilot has no credentials for any cloud\. .*bin/sky check"):
        launch(*words)


def test_without_skypilot_it_says_how_to_get_it(launch, words, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv("LORASMITH_SKY", raising=False)
    with pytest.raises(CloudError, match="environment of its own:\n  lorasmith launch --install"):
        launch(*words)
    monkeypatch.setenv("LORASMITH_SKY", str(tmp_path / "gone"))
    with pytest.raises(CloudError, match=r"LORASMITH_SKY is .*gone, and there is no .*gone\. .*unset it"):
        launch(*words)
    with pytest.raises(SettingsError, match="name a run file"):
        launch()
