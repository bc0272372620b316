"""N processes are one command: one screen, one exit code, and none is left behind."""

import signal
import subprocess
import sys
import time

from lorasmith.cli.processes import run_processes


def program(*lines):
    """Return a program that runs ``lines`` with ``rank``, ``sys`` and ``time`` at hand."""
    return [
        sys.executable,
        "-c",
        "\n".join(["import os, sys, time", "rank = int(os.environ['RANK'])", *lines]),
    ]


def test_all_end_well_and_only_the_first_has_the_screen(capfd):
    lines = ("print(rank, os.environ['WORLD_SIZE'], os.environ['LOCAL_RANK'], sys.argv[1:])",)
    assert run_processes(["train", "a=b"], 3, program(*lines)) == 0
    assert capfd.readouterr().out == "0 3 0 ['train', 'a=b']\n"


def test_of_several_that_fail_the_killed_one_is_named_and_the_rest_is_stopped(capfd):
    lines = (
        "if rank == 2: print('no memory left', file=sys.stderr, flush=True); os.kill(os.getpid(), 9)",
        "time.sleep(0.05)",
        "sys.exit(1)",
    )
    started = time.monotonic()
    assert run_processes([], 3, program(*lines)) == 1
    assert time.monotonic() - started < 15
    said = " ".join(capfd.readouterr().err.split())
    assert "Process 2 (numbered from 0) was ended by SIGKILL; the others were stopped." in said
    assert "It said: no memory left" in said


def test_the_exit_code_is_that_of_who_failed(capfd):
    assert run_processes([], 2, program("if rank == 1: sys.exit('[no such] file')")) == 1
    assert "ended with exit code 1" in (err := capfd.readouterr().err)
    assert "It said: [no such] file" in err
    assert run_processes([], 2, program("if rank == 0: sys.exit(3)")) == 3
    assert capfd.readouterr().err == "", "the first one has told the user itself"


def test_wrong_input_that_all_refuse_is_told_once(capfd):
    lines = ("time.sleep(0.5 * (rank == 0))", "sys.stderr.write('no such setting'); sys.exit(2)")
    assert run_processes([], 3, program(*lines)) == 2
    assert capfd.readouterr().err == "no such setting"


def test_a_signal_is_passed_on_and_the_first_process_says_how_it_ended(tmp_path):
    code = (
        "from lorasmith.cli.processes import run_processes\n"
        f"sys.exit(run_processes([], 2, [sys.executable, '-c', {CATCHING!r}, {str(tmp_path)!r}]))"
    )
    with subprocess.Popen([sys.executable, "-c", f"import sys\n{code}"], stderr=subprocess.PIPE) as process:
        while len(list(tmp_path.iterdir())) < 2:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 3
    assert err == b""
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["0 SIGTERM", "1 SIGTERM"]


CATCHING = """
import os, pathlib, signal, sys, time
rank = os.environ["RANK"]
note = pathlib.Path(sys.argv[1], rank)
def stop(number, frame):
    note.write_text(f"{rank} {signal.Signals(number).name}")
    sys.exit(3 if rank == "0" else 0)
signal.signal(signal.SIGTERM, stop)
note.write_text("ready")
time.sleep(60)
"""
