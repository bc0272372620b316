"""Several processes give what one gives, and none of them waits for ever."""

import json
import multiprocessing
import socket
from contextlib import closing

import numpy as np
import pytest
from safetensors.numpy import load_file

from lorasmith.training.distributed import divide

from .team_member import train_as

# float32 sums of up to some thousand numbers in another order; after 12 AdamW steps at a rate of 0.01 each weight has
# moved by up to 0.12.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-4


@pytest.fixture(scope="module")
def processes():
    """A server that has imported everything once: each process is forked from it in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.team_member", "lorasmith.training.job"])
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


def test_the_dearest_packs_are_given_out_first_and_none_twice():
    assert divide([7, 6, 3, 3], 2) == [[0, 3], [1, 2]]
    assert divide([5], 3) == [[0], [], []]
    assert divide([1, 1, 1, 9], 2) == [[3], [0, 1, 2]]


def test_when_a_process_is_killed_the_others_say_so_and_fewer_can_go_on(processes, words, tmp_path, alone):
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
