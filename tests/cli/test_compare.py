"""The command: real trainings side by side, one that fails, and a second start that trains nothing."""

import json

import pytest
import yaml
from typer.testing import CliRunner

from lorasmith.cli import compare, main
from lorasmith.errors import RunError, SettingsError, TrainingError


@pytest.fixture
def lorasmith(monkeypatch, tmp_path, tiny_base_folder, training_rows):
    """Run a command in a folder with run.yaml; return its result, errors raised."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faq.json").write_text(json.dumps(training_rows))
    sections = {
        "base": {"model": str(tiny_base_folder), "device": "cpu", "dtype": "float32"},
        "data": {"train": "faq.json"},
        "engine": {"threads": 1, "compile": False},
        "training": {"epochs": 2, "batch_size": 6, "validation_share": 0.25},
        "report": {"max_answer_tokens": 4},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sections))

    def run(*words):
        monkeypatch.setattr("sys.argv", ["lorasmith", *words])
        result = CliRunner(env={"COLUMNS": "200"}).invoke(main.app, list(words))
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.mark.slow
def test_methods_are_trained_asked_and_ranked_and_a_second_start_trains_nothing(
    lorasmith, tmp_path, monkeypatch
):
    train_apart = compare.train_apart

    def train_all_but_full(file, *args):
        if file.stem == "full":
            raise TrainingError("no memory")
        return train_apart(file, *args)

    monkeypatch.setattr(compare, "train_apart", train_all_but_full)
    words = ("compare", "run.yaml", "--methods", "ia3,full")
    result = lorasmith(*words)
    folder = tmp_path / "runs" / "compare-faq"
    assert result.exit_code == 1
    assert "full failed: no memory" in result.output
    assert "Best: ia3, with 0 of 6" in result.output
    values = json.loads((folder / "comparison.json").read_text())
    (ia3,) = values["runs"]
    assert ia3["num_trained"] == 192
    assert ia3["loss"] < values["untuned"]["loss"]
    assert ia3["peak_bytes"] > 10 * 2**20
    assert values["failed"] == {"full": "no memory"}

    def refuse(*args):
        raise TrainingError("trained again")

    monkeypatch.setattr(compare, "train_apart", refuse)
    again = lorasmith(*words)
    assert "full failed: trained again" in again.output
    assert "ia3 failed" not in again.output
    with pytest.raises(
        RunError, match=r"holds a comparison with other settings \(ia3.yaml differs\).*--name"
    ):
        lorasmith(*words, "training.epochs=3")


def test_a_comparison_that_is_stopped_says_how_to_go_on(lorasmith, monkeypatch):
    monkeypatch.setattr(compare, "train_apart", lambda *args: False)
    result = lorasmith("compare", "run.yaml", "--methods", "lora,ia3")
    assert result.exit_code == 3
    assert "Stopped in lora (1 of 2); the same command goes on with it." in result.output


@pytest.mark.parametrize("more", [[], ["--search"]])
def test_a_comparison_is_not_gone_on_with_against_run_resume_never(more, lorasmith, monkeypatch):
    monkeypatch.setattr(compare, "train_apart", lambda *args: False)
    words = ["compare", "run.yaml", "--methods", "lora,ia3", "run.resume=never"]
    assert lorasmith(*words).exit_code == 3  # stopped: there was none before
    with pytest.raises(RunError, match=r"compare-faq is there already\. .*--name NAME"):
        lorasmith(*words, *more)


def test_one_run_is_nothing_to_compare(lorasmith):
    with pytest.raises(SettingsError, match=r"One run is nothing to compare: name --methods"):
        lorasmith("compare", "run.yaml")
