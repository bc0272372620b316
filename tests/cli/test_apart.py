"""A training in a process of its own: its end, its words when it fails, and how it is stopped."""

import os
import signal
import stat
import sys

import pytest

from lorasmith.cli import apart
from lorasmith.errors import TrainingError


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Run a shell script in place of lorasmith train."""

    def run(script, watch=lambda steps: False):
        program = tmp_path / "program"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(program))
        monkeypatch.setattr(apart, "_SECONDS_BETWEEN_LOOKS", 0.02)
        return apart.train_apart(tmp_path / "run.yaml", tmp_path / "run", tmp_path / "run.log", watch)

    return run


def test_a_training_that_ends_well_has_said_everything_to_its_log(start, tmp_path):
    assert start('echo "$@"; echo hidden >&2') is True
    command, hidden = (tmp_path / "run.log").read_text().splitlines()
    assert command == f"-m lorasmith.cli.main train {tmp_path / 'run.yaml'}"
    assert hidden == "hidden"


@pytest.mark.parametrize(
    ("script", "told"),
    [
        (
            "echo Reading; echo 'Error: the base is'; echo not there; exit 2",
            r"^the base is not there \(all of it: .*run.log\)",
        ),
        ("echo 'ZeroDivisionError: x'; exit 1", "^ZeroDivisionError: x"),
        ("kill -KILL $$", "^The system ended it, most often for want of memory"),
        ("exit 7", "^It ended with exit code 7"),
    ],
)
def test_a_training_that_fails_is_quoted(start, script, told):
    with pytest.raises(TrainingError, match=told):
        start(script)


def test_watching_can_end_it(start):
    assert start("sleep 30", lambda steps: True) is False


def test_ctrl_c_is_passed_on_and_the_training_ends_by_itself(start, tmp_path):
    # Tests that were started with & ignore Ctrl-C, so would their children, and sh cannot trap what it ignores.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt(steps):
        if (tmp_path / "ready").exists():
            os.kill(os.getpid(), signal.SIGINT)
        return False

    assert (
        start(f"trap 'exit 3' INT; touch {tmp_path}/ready; while :; do sleep 0.02; done", interrupt) is False
    )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_settings_of_the_environment_do_not_overrule_the_run_file(start, tmp_path, monkeypatch):
    monkeypatch.setenv("LORASMITH_METHOD__NAME", "dora")
    monkeypatch.setenv("LORASMITH_CACHE", "here")
    start("env")
    said = (tmp_path / "run.log").read_text()
    assert "LORASMITH_CACHE=here" in said
    assert "LORASMITH_METHOD" not in said


def test_the_newest_steps_are_whole_lines(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    assert apart.read_newest(file) == []
    file.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert apart.read_newest(file) == [{"step": 1}, {"step": 2}]
    monkeypatch.setattr(apart, "_TAIL_BYTES", 20)
    assert apart.read_newest(file) == [{"step": 2}]
