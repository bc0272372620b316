"""SIGKILL at random steps, also while a checkpoint is written; the resumed run ends with the same bits."""

import json
import multiprocessing
import os
import random
import signal
import time

import pytest
from safetensors.numpy import load_file

from lorasmith.training.reporters import read_metrics

from .killed_run import train_to_the_end

NUM_KILLS = 10
NUM_STEPS = 48


@pytest.fixture(params=[0.0, 0.1], ids=["shared prefixes", "dropout"])
def run_file(request, tmp_path, tiny_base_folder):
    rows = [{"instruction": f"What is number {i}?", "output": f"It is the {i * 7}th."} for i in range(32)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    file = tmp_path / "run.yaml"
    file.write_text(
        f"base: {{model: '{tiny_base_folder}', dtype: float32}}\n"
        "data: {train: rows.json}\n"
        f"method: {{r: 4, lora_dropout: {request.param}}}\n"
        "engine: {threads: 1}\n"
        "training: {batch_size: 4, epochs: 6, learning_rate: 0.01, save_every: 2, validation_share: 0.1}\n"
    )
    return file


@pytest.fixture(scope="module")
def processes():
    """A server that has imported everything once: each run is forked from it in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.killed_run", "lorasmith.training.job"])
    return context


def start(processes, run_file, run_dir):
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=train_to_the_end, args=(str(run_file), str(run_dir), sender))
    process.start()
    sender.close()
    return process, receiver


def steps_until_end(process, receiver):
    steps = []
    while True:
        try:
            step = receiver.recv()
        except EOFError:
            break
        if step == -1:
            break
        steps.append(step)
    process.join(60)
    return steps


@pytest.mark.slow
def test_killed_ten_times_a_run_ends_with_the_same_bits(processes, run_file, tmp_path):
    process, receiver = start(processes, run_file, tmp_path / "whole")
    assert steps_until_end(process, receiver) == list(range(1, NUM_STEPS + 1))
    assert process.exitcode == 0

    chance = random.Random(7)
    kill_after = sorted(chance.sample(range(1, NUM_STEPS - 1), NUM_KILLS))
    run_dir = tmp_path / "killed"
    for target in kill_after:
        process, receiver = start(processes, run_file, run_dir)
        step = 0
        while step < target:
            step = receiver.recv()
        time.sleep(chance.uniform(0, 0.03))  # somewhere in the next step, or in its checkpoint
        os.kill(process.pid, signal.SIGKILL)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    # What a kill in the middle of a save leaves, in case none of the ten hit one.
    (run_dir / "checkpoints" / ".step-000999.abc.part").mkdir()
    (run_dir / ".run.json.abc.part").write_text("{")
    process, receiver = start(processes, run_file, run_dir)
    last = steps_until_end(process, receiver)
    assert process.exitcode == 0
    assert last[-1] == NUM_STEPS
    assert last[0] > 1, "the last start must have gone on from a checkpoint"

    whole = load_file(tmp_path / "whole" / "adapter" / "adapter_model.safetensors")
    killed = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    assert whole.keys() == killed.keys()
    for name, weight in whole.items():
        assert (weight == killed[name]).all(), name
    # The metrics tell of every step once, as if nothing had happened.
    expected = [(m["step"], m["loss"]) for m in read_metrics(tmp_path / "whole" / "metrics.jsonl")]
    assert [(m["step"], m["loss"]) for m in read_metrics(run_dir / "metrics.jsonl")] == expected
    leftovers = [path.name for path in run_dir.rglob("*") if ".part" in path.name or ".previous" in path.name]
    assert leftovers == []


@pytest.mark.slow
def test_two_processes_do_not_train_into_one_folder(processes, run_file, tmp_path):
    process, receiver = start(processes, run_file, tmp_path / "run")
    receiver.recv()
    second, receiver_of_second = start(processes, run_file, tmp_path / "run")
    assert receiver_of_second.recv() == "RunError"
    second.join(60)
    steps_until_end(process, receiver)
    assert process.exitcode == 0
