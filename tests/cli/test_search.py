"""The search for learning rates and ranks: what it tries, ends early, keeps, and writes; trainings are played."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import yaml
from typer.testing import CliRunner

from lorasmith.cli import main, search
from lorasmith.cli.candidates import make_candidates
from lorasmith.cli.run_file import load_run_file
from lorasmith.cli.search import open_study, space_of
from lorasmith.errors import MissingExtraError, SettingsError, TrainingError


@pytest.fixture
def played(tmp_path, monkeypatch, tiny_base_folder):
    """run.yaml in the working folder, and trainings that take a minute each; the best rate is 0.02, the best r 32."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faq.json").write_text(json.dumps([{"instruction": "Who?", "output": "We."}] * 4))
    sections = {
        "base": {"model": str(tiny_base_folder)},
        "data": {"train": "faq.json"},
        "method": {"r": 8},
        "training": {"learning_rate": 0.005, "validation_share": 0.25, "epochs": 4},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(sections))
    made = SimpleNamespace(seconds=0.0, files=[], behind=0, fault=None, stops_at=None)

    def train_apart(file, run_dir, log, watch):
        run_file = load_run_file(file, (), {})
        made.files.append(run_file)
        if made.fault:
            raise TrainingError(made.fault)
        if made.stops_at == len(made.files):
            return False
        worse = abs(math.log(run_file.training.learning_rate / 0.02))
        worse += abs(math.log2(getattr(run_file.method, "r", 1) / 32)) / 10
        run_dir.mkdir(parents=True)
        steps = [
            {"step": step, "num_steps": 4, "loss": 1.0, "validation_loss": 1 + worse + 1 / step}
            for step in (1, 2, 3, 4)
        ]
        for count in (1, 2, 3):
            made.seconds += 15
            if watch(steps[:count]):
                made.behind += 1
                return False
        made.seconds += 15
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        return True

    monkeypatch.setattr(search, "train_apart", train_apart)
    monkeypatch.setattr(search, "time", SimpleNamespace(monotonic=lambda: made.seconds))
    return made


def compare(*words):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(main.app, ["compare", *words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(autouse=True)
def argv(monkeypatch):
    monkeypatch.setattr("sys.argv", ["lorasmith", "compare"])


def test_the_best_found_is_better_than_its_own_and_written_as_a_run_file(played, tmp_path):
    output = compare("run.yaml", "--search", "--minutes", "30", "--methods", "lora,ia3").output
    first, second = played.files[:2]
    assert (first.method.name, first.method.r, first.training.learning_rate) == ("lora", 8, 0.005)
    assert (second.method.name, second.training.learning_rate) == ("ia3", pytest.approx(0.0632, rel=1e-2))
    assert not first.report.after_training
    assert played.behind > 0
    assert 30 * 60 <= played.seconds < 31 * 60
    best = load_run_file("runs/compare-faq/best.yaml", (), {})
    assert best.method.name in ("lora", "ia3")
    assert 0.01 < best.training.learning_rate < 0.04
    assert (best.training.epochs, best.run.name, best.report.after_training) == (4, None, True)
    assert "trial 1: lora, learning rate 0.005, r 8: validation loss 2.8363" in output
    assert "behind, ended early" in output
    assert "Its own settings (" in output
    assert "Next: lorasmith train runs/compare-faq/best.yaml" in output
    assert not (tmp_path / "runs" / "compare-faq" / "trial").exists()


def test_a_search_that_was_stopped_goes_on_with_other_trials(played):
    played.stops_at = 3
    stopped = compare("run.yaml", "--search", "--minutes", "30")
    assert stopped.exit_code == 3
    assert "trial 3" in stopped.output
    assert "the same command goes on" in stopped.output
    played.stops_at = None
    output = compare("run.yaml", "--search", "--minutes", "5").output
    assert "trial 1:" not in output
    assert "trial 4:" in output
    rates = [run_file.training.learning_rate for run_file in played.files]
    assert len(set(rates)) == len(rates)


def test_own_settings_that_were_stopped_are_tried_again_at_the_next_start(played):
    played.stops_at = 1
    words = ("run.yaml", "--search", "--methods", "lora,ia3", "--minutes", "2.5")
    assert compare(*words).exit_code == 3
    played.stops_at = None
    output = compare(*words).output
    assert "trial 2: ia3, learning rate 0.063: validation loss" in output
    assert "trial 3: lora, learning rate 0.005, r 8: validation loss 2.8363" in output


def test_what_is_running_at_the_end_of_the_time_is_ended(played):
    output = compare("run.yaml", "--search", "--minutes", "1.5").output
    assert "trial 2" in output
    assert "out of time, ended early" in output
    assert "These are its own settings: nothing that was tried is better." in output
    with pytest.raises(TrainingError, match=r"No trial came to its end within 0.5 minutes. Give more time"):
        compare("run.yaml", "--search", "--minutes", "0.5", "--name", "short")


def test_when_every_trial_fails_the_fault_is_told(played):
    played.fault = "no memory"
    with pytest.raises(TrainingError, match="no memory"):
        compare("run.yaml", "--search")
    assert len(played.files) == 2


def test_a_search_needs_a_validation_loss_and_optuna(played, tmp_path, monkeypatch):
    (tmp_path / "new.json").write_text('[{"instruction": "Who?", "output": "We."}]')
    with pytest.raises(
        SettingsError, match=r"A search needs a validation loss.*training.validation_share=0.2"
    ):
        compare("run.yaml", "--search", "training.validation_share=0", "report.data=new.json")
    # Questions it needs none, so plain texts are as good as answers.
    compare("run.yaml", "--search", "--minutes", "2", "objective.name=text")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"compare --search needs .*'lorasmith\[search\]'"):
        open_study(make_candidates(["run.yaml"], []), tmp_path)


def test_losses_of_two_objectives_choose_nothing(played, tmp_path):
    sections = yaml.safe_load((tmp_path / "run.yaml").read_text())
    for name in ("dpo", "orpo"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**sections, "objective": {"name": name}}))
    with pytest.raises(SettingsError, match=r"validation loss, and those of dpo and orpo are no measure"):
        compare("dpo.yaml", "orpo.yaml", "--search")


def test_only_low_rank_methods_have_ranks_to_try(played):
    spaces = {c.name: space_of(c.run_file) for c in make_candidates(["run.yaml"], ["lora", "vera", "full"])}
    assert spaces["lora"].ranks == (8, 4, 16, 32, 64)
    assert spaces["vera"].ranks == spaces["full"].ranks == ()


def test_rates_are_tried_around_the_one_that_the_run_would_choose(played, tmp_path):
    pair = {"prompt": "Who?", "chosen": "We.", "rejected": "They."}
    (tmp_path / "pairs.json").write_text(json.dumps([pair] * 4))
    (tmp_path / "four.json").write_text(
        json.dumps([{"instruction": f"Who is {n}?", "output": "We."} for n in range(4)])
    )
    auto = ["training.learning_rate=auto", "data.train=four.json"]
    of_answers = space_of(load_run_file("run.yaml", auto, {}))
    of_pairs = space_of(load_run_file("run.yaml", [*auto, "objective.name=dpo", "data.train=pairs.json"], {}))
    assert of_pairs.rate == pytest.approx(of_answers.rate / 20)
    long = space_of(load_run_file("run.yaml", [*auto, "training.epochs=501"], {}))
    assert long.rate == pytest.approx(of_answers.rate / 1.5)


def test_the_time_between_a_crash_and_the_next_start_is_not_counted(played, tmp_path):
    from datetime import datetime, timedelta

    import optuna

    candidates = make_candidates(["run.yaml"], [])
    study = open_study(candidates, tmp_path / "runs" / "compare-faq")
    study.add_trial(
        optuna.trial.FrozenTrial(
            number=0,
            state=optuna.trial.TrialState.RUNNING,
            value=None,
            datetime_start=datetime.now() - timedelta(hours=9),
            datetime_complete=None,
            params={},
            distributions={},
            user_attrs={},
            system_attrs={},
            intermediate_values={},
            trial_id=0,
        )
    )
    output = compare("run.yaml", "--search", "--minutes", "3").output
    assert "trial 2: run, learning rate" in output
    assert "Next: lorasmith train" in output
