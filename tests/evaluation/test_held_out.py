"""The validation share is the one that training held out, also where rows were left out and all stand on one line."""

import json

import pytest

from lorasmith.cli.run_file import load_run_file, prepare
from lorasmith.evaluation.held_out import TrainingData, choose_questions, locate, sample_training
from lorasmith.evaluation.settings import ReportSettings


@pytest.mark.parametrize("num_long", [0, 5])
def test_the_share_is_what_training_held_out(tiny_base_folder, tmp_path, num_long):
    rows = [{"instruction": f"What is {i}?", "output": f"It is {i}."} for i in range(20)]
    for place in range(num_long):
        rows.insert(3 * place, {"instruction": "Long? " * 200, "output": f"{place}"})
    (tmp_path / "faq.json").write_text(json.dumps(rows))
    words = [f"base.model={tiny_base_folder}", f"data.train={tmp_path / 'faq.json'}", "data.overlong=drop"]
    words += ["training.validation_share=0.3", "base.device=cpu", "base.dtype=float32"]
    job = prepare(load_run_file(None, words, {}), tmp_path / "run")
    training = TrainingData(tmp_path / "run", job.record)
    share = training.hold_out_share(job.recipe, job.tokenizer)
    kept = [e.answer for e in training.examples() if "Long" not in e.messages[0].content]

    def texts(dataset):
        return [job.tokenizer.decode(example.input_ids) for example in dataset]

    assert len(share) == 6
    assert all(row.reference in text for row, text in zip(share, texts(job.validation), strict=True))
    assert all(answer in text for answer, text in zip(kept, texts(job.dataset), strict=True))
    assert len(sample_training(training.examples(), len(kept), 3)) == 3


def test_rows_of_the_validation_file_that_training_skipped_are_not_asked(tiny_base_folder, tmp_path):
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."} for i in range(6)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    skipped = [{**rows[0], "prompt": "a?", "rejected": rows[0]["chosen"]}, {**rows[0], "chosen": " "}]
    held_out = [{**row, "prompt": f"So, {row['prompt']}"} for row in rows[:3]]
    (tmp_path / "held_out.json").write_text(json.dumps([skipped[0], *held_out, skipped[1]]))
    words = [f"base.model={tiny_base_folder}", f"data.train={tmp_path / 'pairs.json'}", "objective.name=dpo"]
    words += [f"data.validation={tmp_path / 'held_out.json'}", "base.device=cpu", "base.dtype=float32"]
    job = prepare(load_run_file(None, words, {}), tmp_path / "run")
    training = TrainingData(tmp_path / "run", job.record)
    (asked,) = choose_questions(
        tmp_path / "run", job.record, training, ReportSettings(), job.recipe, job.tokenizer
    )
    assert [row.question for row in asked.rows] == [row["prompt"] for row in held_out]


def test_a_path_of_the_run_is_found_from_the_folders_above_it(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "faq.json").write_text("[]")
    run_dir = tmp_path / "runs" / "faq"
    run_dir.mkdir(parents=True)
    monkeypatch.chdir(run_dir)
    assert locate("data/faq.json", run_dir) == str(tmp_path / "data" / "faq.json")
    assert locate("data/gone.json", run_dir) == "data/gone.json"
    assert locate("/data/faq.json", run_dir) == "/data/faq.json"
