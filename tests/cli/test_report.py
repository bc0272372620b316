"""The command, and the report that a training ends with: on screen, in the run folder, switched off, interrupted."""

import json

import pytest
from typer.testing import CliRunner

from lorasmith.cli import main, report
from lorasmith.cli.run_file import override_report
from lorasmith.errors import DataError, SettingsError

FAST = ("report.max_answer_tokens=4", "report.max_training_questions=3")


@pytest.fixture
def lorasmith(monkeypatch, tmp_path):
    """Run a command in an empty folder; return its result, errors raised."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr("sys.argv", ["lorasmith", *words])
        result = CliRunner(env={"COLUMNS": "250"}).invoke(main.app, list(words))
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def words(tiny_base_folder, tmp_path):
    """A training of two steps, with a file of questions that were not trained on."""
    rows = [{"instruction": f"What is {i}?", "output": f"It is {i}."} for i in range(8)]
    (tmp_path / "faq.json").write_text(json.dumps(rows))
    (tmp_path / "new.json").write_text(
        json.dumps([{"instruction": "Who?", "output": "We.", "keywords": ["we"]}])
    )
    settings = ("training.epochs=1", "training.batch_size=4", *FAST)
    return ("train", "--model", str(tiny_base_folder), "--data", "faq.json", "--name", "mine", *settings)


def test_a_training_ends_with_its_report(lorasmith, words, tmp_path):
    output = lorasmith(*words, "report.data=new.json").output
    assert "1 held-out question is too few to tell" in output or "Do not ship" in output
    assert "runs/mine/report.html" in output
    run_dir = tmp_path / "runs" / "mine"
    facts = json.loads((run_dir / "report.json").read_text())
    assert facts["held_out"]["sets"][0]["name"] == "new.json"
    assert facts["verdict"]["sentence"] in (run_dir / "README.md").read_text()
    before = (run_dir / "report.html").read_bytes()
    assert "finished already" in lorasmith(*words, "report.data=new.json").output
    assert (run_dir / "report.html").read_bytes() == before

    again = lorasmith("report", "--run", "runs/mine", "--data", "new.json", "report.ship_right=0.99")
    assert "Report: " in again.output
    facts = json.loads((run_dir / "report.json").read_text())
    assert facts["settings"]["ship_right"] == 0.99
    assert facts["settings"]["max_answer_tokens"] == 4  # of the run file
    with pytest.raises(SettingsError, match=r"no setting report.ship_rigt; did you mean report.ship_right"):
        lorasmith("report", "--run", "runs/mine", "report.ship_rigt=0.9")


def test_it_can_be_switched_off(lorasmith, words, tmp_path):
    output = lorasmith(*words, "report.after_training=false").output
    assert "report.html" not in output
    assert not (tmp_path / "runs" / "mine" / "report.html").exists()


def test_a_fault_in_the_held_out_file_is_told_before_the_training(lorasmith, words, tmp_path):
    (tmp_path / "new.json").write_text(json.dumps([{"instruction": "Who?"}]))
    with pytest.raises(DataError, match=r"new.json:1: no question with a reference answer"):
        lorasmith(*words, "report.data=new.json")
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_leaves_the_report_out_and_the_run_whole(lorasmith, words, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "make_page", interrupt)
    result = lorasmith(*words)
    assert result.exit_code == 0
    assert "The run is finished, its report is not" in result.output
    assert "lorasmith report --run runs/mine" in result.output
    assert (tmp_path / "runs" / "mine" / "adapter").is_dir()


def test_settings_are_those_of_the_run_then_those_of_the_command():
    settings = override_report({"ship_right": 0.7, "data": ["a.json"]}, ["report.min_questions=5"])
    assert (settings.ship_right, settings.min_questions, settings.data) == (0.7, 5, ("a.json",))
    for override, fault in (
        ("ship_right", "not of the form section.key=value"),
        ("report.ship_right=2", r"command line: report.ship_right is 2: .*less than or equal to 1"),
        ("report.reject_right=0.9", "reject_right is 0.9, above ship_right"),
        ("training.epochs=2", "training.epochs is fixed since the training; only report.key=value"),
    ):
        with pytest.raises(SettingsError, match=fault):
            override_report({}, [override])
