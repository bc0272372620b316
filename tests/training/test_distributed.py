"""Several processes give what one gives, and none of them waits for ever."""

import json
import multiprocessing
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
import torch
from safetensors.numpy import load_file

from lorasmith.engine.settings import EngineSettings
from lorasmith.errors import BaseModelError, SettingsError
from lorasmith.model.method_settings import DoraSettings, LoraSettings
from lorasmith.model.settings import BaseSettings
from lorasmith.training.distributed import divide
from lorasmith.training.reporters import read_metrics
from lorasmith.training.settings import OutputSettings
from lorasmith.training.sharding import _packed_bytes, check_gathered, check_sharding

from .team_member import train_as

# float32 sums of up to some thousand numbers in another order; after 12 AdamW steps at a rate of 0.01 each weight has
# moved by up to 0.12.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-4


@pytest.fixture(scope="module")
def processes():
    """A server that has imported everything once: each process is forked from it in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    # bitsandbytes is an extra: where it is not installed, nothing is preloaded for it.
    context.set_forkserver_preload(["tests.training.team_member", "lorasmith.training.job", "bitsandbytes"])
    return context


@pytest.fixture(scope="module")
def words(tmp_path_factory, tiny_base_folder):
    """A run of 12 steps; the last of an epoch has one example, so all processes but one have no pack."""
    folder = tmp_path_factory.mktemp("team")
    rows = [
        {"instruction": f"What is {'very ' * (i % 5)} {i}?", "output": f"It is {i * 7}."} for i in range(28)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    return [
        f"base.model={tiny_base_folder}",
        "base.device=cpu",
        "base.dtype=float32",
        f"data.train={folder / 'rows.json'}",
        "method.r=4",
        "engine.threads=1",
        "training.batch_size=8",
        "training.epochs=3",
        "training.learning_rate=0.01",
        "training.save_every=3",
        "training.validation_share=0.1",
        "run.lost_after_seconds=20",
    ]


class Members:
    """The processes of one team."""

    def __init__(self, context, count, words, run_dir):
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.receivers, self.processes = [], []
        for rank in range(count):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=train_as, args=(rank, count, port, words, str(run_dir), sender))
            process.start()
            sender.close()
            self.receivers.append(receiver)
            self.processes.append(process)

    def receive(self, rank):
        assert self.receivers[rank].poll(60), f"process {rank} says nothing"
        return self.receivers[rank].recv()

    def until_end(self, rank):
        """Return the steps that process ``rank`` reports and what it says at the end."""
        steps = []
        while isinstance(said := self.receive(rank), tuple):
            steps.append(said)
        self.processes[rank].join(60)
        return steps, said


@pytest.fixture(scope="module")
def alone(processes, words, tmp_path_factory):
    """The same run by one process: its folder and its steps."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    steps, said = Members(processes, 1, words, run_dir).until_end(0)
    assert said == "end"
    return run_dir, steps


def weights_of(run_dir):
    return load_file(run_dir / "adapter" / "adapter_model.safetensors")


def assert_same_run(run_dir, steps, alone):
    expected_dir, expected = alone
    assert [step for step, _, _ in steps] == [step for step, _, _ in expected][-len(steps) :]
    for (_, loss, validation), (_, right, right_validation) in zip(
        steps, expected[-len(steps) :], strict=True
    ):
        assert loss == pytest.approx(right, rel=LOSS_TOLERANCE)
        assert validation == (right_validation and pytest.approx(right_validation, rel=LOSS_TOLERANCE))
    weights = weights_of(run_dir)
    for name, right in weights_of(expected_dir).items():
        np.testing.assert_allclose(weights[name], right, atol=WEIGHT_TOLERANCE, rtol=0, err_msg=name)


@pytest.mark.parametrize("count", [2, 4])
def test_losses_and_weights_are_those_of_one_process(processes, words, tmp_path, alone, count):
    members = Members(processes, count, words, tmp_path / "run")
    outcomes = [members.until_end(rank) for rank in range(count)]
    assert [said for _, said in outcomes] == ["end"] * count
    assert all(steps == outcomes[0][0] for steps, _ in outcomes), "every process reports the same"
    assert_same_run(tmp_path / "run", outcomes[0][0], alone)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == count


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
def test_preferences_learnt_by_two_processes_are_those_of_one(processes, words, tmp_path, objective):
    labelled = [
        {"instruction": f"What is {'very ' * (i % 5)} {i}?", "output": f"It is {i * 7}.", "label": i % 3 > 0}
        for i in range(28)
    ]
    pairs = [
        {"prompt": row["instruction"], "chosen": row["output"], "rejected": f"Who knows, {i}?"}
        for i, row in enumerate(labelled)
    ]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(labelled if objective == "kto" else pairs))
    own = [*words, f"data.train={data}", f"objective.name={objective}"]
    told = {}
    for count in (1, 2):
        members = Members(processes, count, own, tmp_path / str(count))
        outcomes = [members.until_end(rank) for rank in range(count)]
        assert [said for _, said in outcomes] == ["end"] * count
        told[count] = outcomes[0][0]
    assert_same_run(tmp_path / "2", told[2], (tmp_path / "1", told[1]))
    of_one, of_two = (read_metrics(tmp_path / str(count) / "metrics.jsonl") for count in (1, 2))
    what = "kl" if objective == "kto" else "reward_accuracy"
    for one, two in zip(of_one, of_two, strict=True):
        for name in (what, f"validation_{what}") if "validation_loss" in one else (what,):
            assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name


def test_the_dearest_packs_are_given_out_first_and_none_twice():
    assert divide([7, 6, 3, 3], 2) == [[0, 3], [1, 2]]
    assert divide([5], 3) == [[0], [], []]
    assert divide([1, 1, 1, 9], 2) == [[3], [0, 1, 2]]


@pytest.mark.parametrize("sharded", [[], ["engine.shard_base=true"]], ids=["whole", "sharded"])
def test_when_a_process_is_killed_the_others_say_so_and_fewer_can_go_on(
    processes, words, tmp_path, alone, sharded
):
    words = [*words, *sharded]
    members = Members(processes, 3, words, tmp_path / "run")
    while members.receive(1)[0] < 5:
        pass
    members.processes[2].kill()
    said = members.until_end(0)[1]
    assert said.startswith("LostProcessError: Process 0 of 3")
    assert "The last checkpoint is kept: start the run again, with as many processes as you like" in said
    members.until_end(1)
    assert not list((tmp_path / "run").rglob("*.part"))
    again = Members(processes, 2, words, tmp_path / "run")
    steps, said = again.until_end(0)
    again.until_end(1)
    assert said == "end"
    assert steps[0][0] > 3, "it goes on from a checkpoint"
    assert_same_run(tmp_path / "run", steps, alone)


def test_what_does_not_go_with_a_sharded_base_is_refused_all_at_once():
    engine = EngineSettings(shard_base=True, compile=True)
    output = OutputSettings(sample_questions=("Why?",))
    check_sharding(EngineSettings(), DoraSettings(), BaseSettings(quantization="nf4"), output)
    check_sharding(EngineSettings(shard_base=True), LoraSettings(), BaseSettings(), OutputSettings())
    check_sharding(
        EngineSettings(shard_base=True), LoraSettings(), BaseSettings(quantization="nf4"), OutputSettings()
    )
    with pytest.raises(SettingsError) as refused:
        check_sharding(engine, DoraSettings(), BaseSettings(quantization="int8"), output)
    for fault in (
        "method.name is dora",
        "base.quantization is int8: its weights are no floats",
        "run.sample_questions",
        "engine.compile",
    ):
        assert f"  - {fault}" in str(refused.value)
    assert "leave it out: a base that fits one GPU trains faster whole" in str(refused.value)


def test_four_bits_that_come_back_otherwise_are_noticed():
    class Layer(torch.nn.Module):
        quant_state = "scales"
        weight = torch.tensor([[1.0], [float("nan")]])

        def unshard(self):
            pass

        reshard = unshard

    layer, model = Layer(), Mock()
    model.get_base_model().get_decoder().layers = [layer]
    packed = _packed_bytes(layer)
    check_gathered(model, packed)
    layer.weight = torch.tensor([[1.0], [-float("nan")]])
    with pytest.raises(BaseModelError, match="changed the bytes of 4-bit weights"):
        check_gathered(model, packed)


def can_make_machines():
    """Whether this user may make a network namespace, and has ip(8)."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return False
    tried = ["unshare", "--user", "--map-root-user", "--net", "ip", "link", "add", "m0", "type", "veth"]
    return subprocess.run(tried, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_make_machines(), reason="no network namespaces here")
def test_two_machines_lose_each_other_and_go_on_when_started_again(words, tmp_path, alone):
    done = subprocess.run(
        [
            *("unshare", "--user", "--map-root-user", "--net"),
            *(sys.executable, "-m", "tests.training.two_machines", str(tmp_path)),
            *(word for word in words if "lost_after" not in word),
            "run.lost_after_seconds=5",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cut, mended = json.loads(done.stdout)
    for rank, said in enumerate(cut):
        assert said[-1].startswith(f"LostProcessError: Process {rank} of 2"), said[-1]
        assert "has not answered for 5 s" in said[-1]
    assert [said[-1] for said in mended] == ["end", "end"]
    steps = mended[0][:-1]
    assert steps == mended[1][:-1]
    assert steps[0][0] == 5, "it goes on from the checkpoint of step 4, the best so far"
    assert_same_run(tmp_path / "disk-0" / "run", [tuple(step) for step in steps], alone)
    assert not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / "disk-1").exists(), "the run folder belongs to the first process"


@pytest.mark.slow
def test_torchrun_starts_a_killed_process_again_and_the_run_goes_on(words, tmp_path, alone):
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("--max-restarts", "1", "--monitor-interval", "0.1", "-m", "lorasmith.cli.main", "train"),
        *(*words, f"run.root={tmp_path}", "run.name=run", "report.after_training=false"),
    ]
    metrics = tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as torchrun:
        await_that(torchrun, lambda: len(workers_of(torchrun)) == 2)
        second = workers_of(torchrun)["1"]
        await_that(torchrun, lambda: metrics.is_file() and metrics.read_text().count("\n") >= 4)
        second.kill()
        output, _ = torchrun.communicate(timeout=300)
    assert torchrun.returncode == 0, output
    assert "Going on from step" in output
    assert output.count("Done: loss") == 1, "only the first process has the screen"
    steps = [(m["step"], m["loss"], m.get("validation_loss")) for m in read_metrics(metrics)]
    assert_same_run(tmp_path / "run", steps, alone)


def workers_of(torchrun):
    """Return the processes that ``torchrun`` has started, by their rank; one that is just being forked has none yet."""
    children = psutil.Process(torchrun.pid).children()
    started = {
        child.environ().get("RANK"): child for child in children if "lorasmith.cli.main" in child.cmdline()
    }
    return {rank: child for rank, child in started.items() if rank is not None}


def await_that(process, claim):
    deadline = time.monotonic() + 240
    while not claim():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_a_sharded_base_gives_the_same_adapter(processes, words, tmp_path, alone, checkpointing):
    sharded = [*words, "engine.shard_base=true", f"engine.gradient_checkpointing={checkpointing}"]
    members = Members(processes, 2, sharded, tmp_path / "run")
    outcomes = [members.until_end(rank) for rank in range(2)]
    assert [said for _, said in outcomes] == ["end"] * 2
    assert outcomes[0][0] == outcomes[1][0]
    assert_same_run(tmp_path / "run", outcomes[0][0], alone)


@pytest.mark.parametrize(
    ("base", "count_whole"),
    [
        ("base.quantization=nf4", 1),
        # In other packs bfloat16 rounds otherwise, and two processes cut other packs than one.
        ("base.dtype=bfloat16", 2),
    ],
)
def test_a_sharded_base_in_fewer_bits_gives_the_adapter_of_the_whole_one(
    processes, words, tmp_path, base, count_whole
):
    if "nf4" in base:
        pytest.importorskip("bitsandbytes")
    words = [*words, base, "training.epochs=1", "engine.gradient_checkpointing=true"]
    teams = [
        Members(processes, count_whole, words, tmp_path / "whole"),
        Members(processes, 2, [*words, "engine.shard_base=true"], tmp_path / "sharded"),
    ]
    outcomes = [[team.until_end(rank) for rank in range(len(team.processes))] for team in teams]
    assert [said for team in outcomes for _, said in team] == ["end"] * (count_whole + 2)
    assert_same_run(tmp_path / "sharded", outcomes[1][0][0], (tmp_path / "whole", outcomes[0][0][0]))
