"""The demo goes the whole road: tried on a tiny base, whose answers are noise, for two steps."""

import json
from pathlib import Path

from lorasmith.cli import demo

ROOT = Path(__file__).resolve().parents[2]


def test_the_whole_road_and_again(tiny_base_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    settings = [f"base.model={tiny_base_folder}", "data.max_seq_len=1024", "training.max_steps=2"]
    settings += ["report.max_answer_tokens=6", "report.max_training_questions=20"]
    demo.command(out=Path("merged/handbook"), settings=settings)
    shown = capsys.readouterr().out
    for station in ("Check the data", "before", "Train", "after", "Merge, and prove it", "Report"):
        assert station in shown
    assert "Ready to train" in shown
    assert "Proven equal" in shown
    assert "0 of 90 (0%) of the held-out answers are right" in shown
    assert "Do not ship" in shown
    assert "What next" in shown
    report = json.loads((tmp_path / "runs" / "handbook" / "report.json").read_text())
    asked = {question_set["name"]: question_set["asked"] for question_set in report["held_out"]["sets"]}
    assert asked == {"handbook_eval_ordinary.json": 60, "handbook_eval.json": 30}
    assert len(report["held_out"]["merged"]["records"]) == 90
    assert len(report["trained"]["records"]) == 20
    assert (tmp_path / "runs" / "handbook" / "report.html").is_file()
    assert (tmp_path / "merged" / "handbook" / "model.safetensors").is_file()

    demo.command(out=Path("merged/handbook"), settings=settings)  # finds the finished run
    assert "finished already" in capsys.readouterr().out


def test_nothing_that_is_asked_was_trained_on():
    """The evaluation rows are not in the training data, neither as they stand nor with other capitals or spaces."""
    folder = ROOT / "examples" / "handbook"

    def questions(name):
        rows = json.loads((folder / name).read_text(encoding="utf-8"))
        return {" ".join(row["instruction"].lower().split()) for row in rows}

    trained = questions("handbook_train.json")
    assert len(trained) > 150
    for name in ("handbook_eval.json", "handbook_eval_ordinary.json"):
        assert not trained & questions(name), name
