"""``lorasmith train`` and ``init`` as a user meets them: text, exit codes, what is on disk."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console
from typer.testing import CliRunner

import lorasmith as lorasmith_package
from lorasmith.cli import main
from lorasmith.cli.train import _again
from lorasmith.errors import LorasmithError, SettingsError
from lorasmith.training.reporters import note_samples, read_samples


@pytest.fixture
def lorasmith(monkeypatch, tmp_path):
    """Run a command in an empty folder; return (exit code, output, error)."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str):
        monkeypatch.setattr(sys, "argv", ["lorasmith", *words])
        result = CliRunner(env={"COLUMNS": "200"}).invoke(main.app, list(words))
        if result.exception and not isinstance(result.exception, (LorasmithError, SystemExit)):
            raise result.exception
        return result

    return run


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "faq.json"
    file.write_text(
        json.dumps([{"instruction": f"What is {i}?", "output": f"It is {i}."} for i in range(12)])
    )
    return file


NO_REPORT = ("report.after_training=false",)


def train_words(base, rows, *more):
    return (
        "train",
        "--model",
        str(base),
        "--data",
        str(rows),
        "training.epochs=2",
        "training.batch_size=4",
        *NO_REPORT,
        *more,
    )


@pytest.mark.parametrize("command", ["", *main.COMMANDS])
def test_help_needs_no_torch(command):
    code = f"import sys; sys.argv = ['lorasmith', *{[command] if command else []}, '--help']\n"
    code += "from lorasmith.cli.main import main\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip().endswith("False")


def test_a_run_from_flags_leaves_a_whole_run_folder(lorasmith, tiny_base_folder, rows, tmp_path):
    result = lorasmith(*train_words(tiny_base_folder, rows, "--name", "mine", "run.trackers=[tensorboard]"))
    assert result.exit_code == 0, result.output
    run_dir = tmp_path / "runs" / "mine"
    for name in (
        "run.json",
        "receipt.json",
        "metrics.jsonl",
        "loss.png",
        "README.md",
        "adapter/adapter_config.json",
    ):
        assert (run_dir / name).stat().st_size > 0, name
    assert list(run_dir.glob("trackers/**/events*"))
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    record = json.loads((run_dir / "run.json").read_text())
    assert record["result"]["steps"] == 6
    assert record["data"]["num_examples"] == 12
    assert record["settings"]["engine"]["threads"] >= 1
    assert record["settings"]["base"]["dtype"] in ("float32", "bfloat16")  # what "auto" was found to be
    checkpoint = lorasmith_package.open_chat(run_dir / "checkpoints" / "step-000006" / "adapter")
    assert checkpoint.recipe == lorasmith_package.Chat.from_run(run_dir).recipe
    assert checkpoint.notes == ()
    assert "lorasmith ask" in result.output


@pytest.mark.parametrize(
    ("more", "ways"),
    [
        ((), r"\d+ padded, \d+ packed, \d+ with shared prefixes\."),
        (("method.lora_dropout=0.1",), r"\d+ padded, \d+ packed\."),
        (("method.name=prompt",), r"\d+ padded\."),
    ],
)
def test_only_what_a_run_can_do_is_counted(lorasmith, tiny_base_folder, rows, more, ways):
    result = lorasmith(*train_words(tiny_base_folder, rows, *more, "training.max_steps=1"))
    assert re.search(f"Tokens an epoch: {ways}", " ".join(result.output.split())), result.output


@pytest.mark.parametrize(("name", "shown"), [("dpo", "margin"), ("simpo", "margin"), ("kto", "kl")])
def test_what_an_objective_tells_stands_beside_the_loss(lorasmith, tiny_base_folder, tmp_path, name, shown):
    rows = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."} for i in range(12)]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    more = (f"objective.name={name}", "training.validation_share=0.3", "--name", "mine")
    result = lorasmith(*train_words(tiny_base_folder, rows, *more))
    assert result.exit_code == 0, result.output
    assert f"steps of 4 {'answers' if name == 'kto' else 'pairs'}." in result.output
    assert re.search(rf"step 1/\d+  loss \d.*  {shown} -?\d\.\d{{3}}  right \d+%", result.output)
    assert re.search(r"validation loss \d\.\d+, right \d+%", result.output)


def test_a_finished_run_is_not_trained_again(lorasmith, tiny_base_folder, rows, tmp_path):
    words = train_words(tiny_base_folder, rows, "--name", "mine")
    lorasmith(*words)
    before = (tmp_path / "runs" / "mine" / "adapter" / "adapter_model.safetensors").read_bytes()
    result = lorasmith(*words)
    assert result.exit_code == 0
    assert "finished already" in result.output
    assert (tmp_path / "runs" / "mine" / "adapter" / "adapter_model.safetensors").read_bytes() == before
    refused = lorasmith(*words, "run.resume=never")
    assert "is there already" in str(refused.exception)


def test_other_settings_or_data_under_a_finished_run_are_refused(lorasmith, tiny_base_folder, rows):
    words = train_words(tiny_base_folder, rows, "--name", "mine")
    lorasmith(*words)
    rows.write_text(rows.read_text().replace("It is 3.", "It is three."))
    text = str(lorasmith(*words, "training.epochs=5").exception)
    assert "training.epochs: 2.0 then, 5.0 now" in text
    assert "has changed since" in text
    assert "run.name=NAME" in text


def test_another_base_or_validation_file_under_a_finished_run_is_refused(
    lorasmith, tiny_base_folder, rows, tmp_path
):
    from safetensors.torch import load_file, save_file

    lorasmith(*train_words(tiny_base_folder, rows, "--name", "mine"))
    moved = shutil.copytree(tiny_base_folder, tmp_path / "moved")
    assert "finished already" in lorasmith(*train_words(moved, rows, "--name", "mine")).output
    weights = load_file(moved / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    text = str(lorasmith(*train_words(moved, rows, "--name", "mine")).exception)
    assert re.search(r"base.model: .*tiny-base.* then, .*moved now, other weights", text)
    words = (*train_words(tiny_base_folder, rows, "--name", "mine"), f"data.validation={rows}")
    assert "data.validation: it was another then" in str(lorasmith(*words).exception)


def test_a_validation_file_and_a_share_exclude_each_other(lorasmith, tiny_base_folder, rows):
    words = train_words(tiny_base_folder, rows, f"data.validation={rows}", "training.validation_share=0.1")
    assert "Use one" in str(lorasmith(*words).exception)


@pytest.mark.parametrize(
    ("name", "row", "told"),
    [
        ("sft", {"prompt": "Who?", "completion": "We."}, r"used, 1 example, is held .*check \S*one.json"),
        ("dpo", {"prompt": "Who?", "chosen": "We.", "rejected": "No."}, "1 pair, .*check --pairs "),
        ("kto", {"prompt": "Who?", "chosen": "We.", "rejected": "No."}, "2 answers, .*check --labels "),
    ],
)
def test_a_share_that_leaves_nothing_to_train_on_is_told_in_rows(
    lorasmith, tiny_base_folder, tmp_path, name, row, told
):
    (tmp_path / "one.json").write_text(json.dumps([row]))
    more = (f"objective.name={name}", "training.validation_share=0.9")
    result = lorasmith(*train_words(tiny_base_folder, tmp_path / "one.json", *more))
    assert re.search(told, str(result.exception))


def test_a_warm_up_longer_than_the_run_is_said(lorasmith, tiny_base_folder, rows):
    result = lorasmith(*train_words(tiny_base_folder, rows, "training.warmup_steps=100"))
    assert "the warm-up takes 100 steps and the run has 6" in result.output


def test_an_empty_sample_question_is_told_before_training(lorasmith, tiny_base_folder, rows):
    result = lorasmith(*train_words(tiny_base_folder, rows, 'run.sample_questions=[" "]'))
    assert "empty question" in str(result.exception)


def test_a_full_disk_or_a_file_in_the_way_is_no_traceback(tiny_base_folder, rows, tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    code = "from lorasmith.cli.main import main; main()"
    words = train_words(tiny_base_folder, rows)
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 1
    assert "Error: " in done.stderr
    assert "Traceback" not in done.stderr


def test_other_settings_under_a_stopped_run_are_named(lorasmith, tiny_base_folder, rows, tmp_path):
    words = train_words(tiny_base_folder, rows, "--name", "mine")
    lorasmith(*words)
    record = json.loads((tmp_path / "runs" / "mine" / "run.json").read_text())
    (tmp_path / "runs" / "mine" / "run.json").write_text(json.dumps({**record, "result": None}))
    rows.write_text(rows.read_text().replace("It is 3.", "It is three."))
    text = str(lorasmith(*words, "method.r=2").exception)
    assert "method.r: 16 then, 2 now" in text
    assert "data: " in text
    assert "has changed since" in text


def test_in_a_terminal_a_bar_shows_step_loss_and_time(lorasmith, tiny_base_folder, rows, monkeypatch):
    from lorasmith.cli import train

    screen = Console(force_terminal=True, width=120, file=io.StringIO())
    monkeypatch.setattr(train, "console", screen)
    lorasmith(*train_words(tiny_base_folder, rows, "training.validation_share=0.2"))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.file.getvalue())
    assert "step 0/6" in shown
    assert re.search(r"step 6/6 .*loss \d\.\d{3}  rate \S+  [\d,]+ tokens/s", shown)
    assert "validation loss" in shown
    assert "Reading and tokenising" in shown


def test_sample_questions_are_asked_and_kept_while_it_trains(lorasmith, tiny_base_folder, rows, tmp_path):
    words = ('run.sample_questions=["What is 3?"]', "--name", "mine")
    result = lorasmith(*train_words(tiny_base_folder, rows, *words))
    assert result.output.count("What is 3? →") == 2  # once an epoch
    run_dir = tmp_path / "runs" / "mine"
    assert [(s["step"], s["question"]) for s in read_samples(run_dir)] == [
        (3, "What is 3?"),
        (6, "What is 3?"),
    ]
    note_samples(run_dir, 6, [("What is 3?", "again")])  # a resumed run does its last steps again
    assert [s["answer"] for s in read_samples(run_dir)][1:] == ["again"]


def test_wrong_data_stops_before_the_first_step(lorasmith, tiny_base_folder, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "c", "output":\n')
    result = lorasmith(*train_words(tiny_base_folder, file))
    assert "bad.jsonl:2" in str(result.exception)
    assert not list(tmp_path.glob("runs/*"))


def test_nothing_to_train_says_how(lorasmith):
    assert "lorasmith init" in str(lorasmith("train").exception)


def test_resume_without_a_run_is_refused(lorasmith, tiny_base_folder, rows):
    assert "There is no run" in str(
        lorasmith(*train_words(tiny_base_folder, rows, "--name", "x", "--resume")).exception
    )
    assert "--name" in str(lorasmith(*train_words(tiny_base_folder, rows, "--resume")).exception)


def test_the_list_of_settings(lorasmith):
    output = lorasmith("train", "--list-settings").output
    assert "training.learning_rate" in output
    assert "method.lora_alpha" in output


def test_init_writes_what_trains(lorasmith, tiny_base_folder, tmp_path):
    result = lorasmith("init", "my-team")
    assert result.exit_code == 0
    assert "lorasmith train my-team/run.yaml" in result.output
    trained = lorasmith(
        "train", "my-team/run.yaml", f"base.model={tiny_base_folder}", "training.max_steps=2", *NO_REPORT
    )
    assert trained.exit_code == 0, trained.output
    assert (tmp_path / "runs" / "my-team" / "adapter").is_dir()
    assert "is there already" in str(lorasmith("init", "my-team").exception)


def test_errors_are_printed_without_a_traceback(tmp_path):
    code = "import sys; sys.argv = ['lorasmith', 'train', 'no.yaml']\nfrom lorasmith.cli.main import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("Error: There is no run file no.yaml.")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops_and_the_same_command_goes_on(tiny_base_folder, rows, tmp_path, number):
    words = train_words(tiny_base_folder, rows, "--name", "mine")
    words = [word if word != "training.epochs=2" else "training.epochs=100" for word in words]
    command = [sys.executable, "-c", "from lorasmith.cli.main import main; main()", *words]
    metrics = tmp_path / "runs" / "mine" / "metrics.jsonl"
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A test run that was started with & hands down that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        deadline = time.monotonic() + 120
        while not (metrics.is_file() and metrics.read_text().count("\n") >= 5):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 3, output
    assert "Stopped and saved. Go on with: lorasmith train" in output
    done = metrics.read_text().count("\n")
    assert 5 <= done < 300
    resumed = subprocess.run(
        [*command[:3], *words, "training.save_every=1000", "run.resume=auto"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert f"Going on from step {done}" in resumed.stdout
    assert (
        "its next-token loss of " in resumed.stdout
    )  # with another objective it is not the loss of the steps
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 301))


def test_how_to_go_on_names_as_many_processes(monkeypatch):
    assert _again(["train", "run.yaml"]) == "lorasmith train run.yaml"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert _again(["train", "run.yaml"]) == "lorasmith train run.yaml --processes 2"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert _again(["train", "run.yaml"]) == "the same torchrun command"


def test_under_torchrun_no_more_processes_are_started(lorasmith, monkeypatch, tiny_base_folder, rows):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="torchrun has started this process: leave --processes out"):
        raise lorasmith(*train_words(tiny_base_folder, rows), "--processes", "2").exception


def test_under_torchrun_a_run_needs_a_name(lorasmith, monkeypatch, tiny_base_folder, rows):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match="give the run a name with --name NAME"):
        raise lorasmith(*train_words(tiny_base_folder, rows)).exception


@pytest.mark.slow
def test_two_processes_train_one_run(tiny_base_folder, rows, tmp_path):
    command = [sys.executable, "-m", "lorasmith.cli.main"]
    words = [*train_words(tiny_base_folder, rows), "--processes", "2", "--name", "mine"]
    done = subprocess.run(
        [*command, *words], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Done: loss") == 1
    assert (tmp_path / "runs" / "mine" / "adapter" / "adapter_model.safetensors").is_file()
    assert '"processes": 2' in (tmp_path / "runs" / "mine" / "run.json").read_text()
