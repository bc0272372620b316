"""SkyPilot itself: its schema, its API server, its optimizer. Nothing is rented, and nothing leaves this machine.

HOME is a folder of the test's own with a catalog written by hand and a made-up key of a cloud that SkyPilot believes
without asking it.
"""

import json
import os
import socket
import subprocess

import pytest
from typer.testing import CliRunner

from lorasmith.cli import main
from lorasmith.cloud import launch as sky
from lorasmith.cloud.quote import Offer, Quote
from lorasmith.cloud.task import Bucket, make_task
from lorasmith.errors import CloudError

try:
    SKY = sky.find_sky().resolve()
except CloudError:
    pytest.skip("SkyPilot is not installed (lorasmith launch --install)", allow_module_level=True)

pytestmark = pytest.mark.slow

_PLAIN = "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,Region,GpuInfo,SpotPrice"
_ZONES = f"{_PLAIN},AvailabilityZone"
# Without what it says of its GPU a row is no GPU machine to SkyPilot.
_L4 = "\"{'Gpus': [{'Name': 'L4', 'Count': 1.0, 'MemoryInfo': {'SizeInMiB': 24576}}]}\""
CATALOG = {
    "common/accelerators.csv": 'AcceleratorName,Clouds\nL4,"AWS,GCP,Lambda,Fluidstack,Kubernetes"\nH100,Fluidstack\n',
    "fluidstack/vms.csv": f"{_PLAIN}\nL4::1,L4,1,16,64,0.80,NORWAY,{_L4},\nL4::1,L4,1,16,64,0.70,CANADA,{_L4},\n"
    f"H100::1,H100,1,28,180,2.89,NORWAY,{_L4.replace('L4', 'H100')},\nL4::2,L4,2,32,128,1.50,NORWAY,{_L4},\n",
    "aws/vms.csv": f"{_ZONES},Arch\ng6.4xlarge,L4,1,16,64,1.32,us-east-1,{_L4},0.5,use1-az1,x86_64\n",
    "gcp/vms.csv": f"{_ZONES}\ng2-standard-4,L4,1,4,16,0.7,us-central1,{_L4},0.28,us-central1-a\n",
    "lambda/vms.csv": f"{_PLAIN}\ngpu_1x_l4,L4,1,16,64,0.7,us-east-1,{_L4},\n",
}
READ_TASKS = """
import json, sys, sky
for config in json.load(sys.stdin):
    task = sky.Task.from_yaml_config(config, secrets_overrides=[(name, "?") for name in config.get("secrets", ())])
    print(json.dumps(task.to_yaml_config()))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """What SkyPilot sees of the world; its API server is ended afterwards."""
    home = tmp_path_factory.mktemp("home")
    for name, text in CATALOG.items():
        file = home / ".sky" / "catalogs" / "v8" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (home / ".fluidstack").mkdir()
    (home / ".fluidstack" / "api_key").write_text("api_key made-up")
    (home / ".shadeform").mkdir()
    (home / ".shadeform" / "api_key").write_text("made-up")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    found = {
        "HOME": str(home),
        "SKYPILOT_API_SERVER_LOCAL_PORT": str(port),
        "LORASMITH_SKY": str(SKY),
        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        # Whatever would leave this machine fails at once.
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"),
    }
    yield found
    subprocess.run([SKY, "api", "stop"], env=os.environ | found, capture_output=True, check=True)


@pytest.fixture
def use_sky(environment, monkeypatch, tmp_path):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)


def test_every_kind_of_task_is_one_to_skypilot(use_sky, make_launch, make_quote, tmp_path):
    gcp = {"cloud": "gcp", "region": "us-central1", "spot": True}
    tasks = [
        make_task(make_launch(), [make_quote(), make_quote(**gcp)], str(tmp_path)),
        make_task(make_launch(bucket=Bucket("gs", "team")), [make_quote(**gcp)], str(tmp_path)),
        make_task(make_launch(nodes=2), [make_quote(cloud="lambda")], str(tmp_path)),
        make_task(make_launch(), [make_quote(cloud="kubernetes", region="team")], str(tmp_path)),
        make_task(
            make_launch(serve_port=8000, secrets=("HF_TOKEN",), budget_seconds=3600.0),
            [make_quote()],
            str(tmp_path),
        ),
    ]
    done = subprocess.run(
        [SKY.with_name("python"), "-c", READ_TASKS],
        input=json.dumps(tasks),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    two, spot, nodes, kubernetes, server = map(json.loads, done.stdout.splitlines())
    assert {one["infra"] for one in two["resources"]["any_of"]} == {"aws/us-east-1", "gcp/us-central1"}
    assert spot["resources"]["use_spot"] is True
    assert spot["file_mounts"]["/outputs"]["store"] == "GCS"
    assert nodes["num_nodes"] == 2
    assert kubernetes["resources"]["infra"] == "kubernetes/team"
    assert server["resources"]["ports"] == ["8000"]
    assert server["secrets"] == {"HF_TOKEN": "?"}
    for task, found in zip(tasks, (two, spot, nodes, kubernetes, server), strict=True):
        assert (found["setup"].strip(), found["run"].strip()) == (task["setup"].strip(), task["run"].strip())


def test_a_dry_run_goes_through_skypilots_server_and_optimizer(
    use_sky, tiny_base_folder, tmp_path, monkeypatch
):
    rows = [{"instruction": f"What is number {i}?", "output": f"It is the {i * 7}th."} for i in range(24)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = ["launch", f"base.model={tiny_base_folder}", "data.train=rows.json", "run.name=faq"]
    words += ["--gpu", "L4:1", "--gpu", "H100", "--bucket", "s3://team", "--max-cost", "5", "--dry-run"]
    monkeypatch.setattr("sys.argv", ["lorasmith", *words])
    result = CliRunner(env={"COLUMNS": "200"}).invoke(main.app, words)
    assert result.exit_code == 0, (result.output, result.exception)
    quotes = [line.split()[:3] for line in result.output.splitlines() if " fluidstack/" in line]
    assert quotes[:3] == [
        ["L4:1", "fluidstack/CANADA", "$0.70"],
        ["L4:1", "fluidstack/NORWAY", "$0.80"],
        ["H100:1", "fluidstack/NORWAY", "$2.89"],
    ]
    chosen = [line.split() for line in result.output.splitlines() if "✔" in line]
    assert [line[:2] for line in chosen] == [["Fluidstack", "(CANADA)"]]
    assert "Nothing was rented." in result.output


def test_a_cloud_without_mounted_buckets_is_known_before_the_launch(use_sky):
    """SkyPilot's optimizer would choose it, and the launch would end there."""
    lacks = {"fluidstack": "", "shadeform": "mounted buckets"}
    assert sky.list_clouds(serves=True, nodes=1) == lacks
    lacks["shadeform"] += " and no runs on several machines"
    assert sky.list_clouds(serves=False, nodes=2) == lacks


@pytest.mark.parametrize("port", [None, 8000])
def test_skypilot_knows_nothing_of_what_it_refused(use_sky, make_launch, make_quote, tmp_path, capfd, port):
    (tmp_path / "work").mkdir()
    launch = make_launch(serve_port=port)
    quote = make_quote(cloud="fluidstack", region="CANADA")
    with pytest.raises(CloudError, match="what it says stands above"):
        sky.start(launch, make_task(launch, [quote], str(tmp_path / "work")))
    assert "AWS access is disabled" in capfd.readouterr().err
    assert not sky.knows(launch)


def test_what_skypilot_refuses_is_said_in_its_words(use_sky, make_launch, tmp_path):
    quote = Quote(Offer("fluidstack", "CANADA", "L4", 2, 1.5, spot=False), 1, (60.0, 60.0))
    with pytest.raises(CloudError) as caught:
        sky.check_task(make_task(make_launch(), [quote], str(tmp_path)))
    said = str(caught.value)
    assert said.startswith("SkyPilot failed:\n")
    assert "ResourcesUnavailableError" in said
    assert "Traceback" not in said
