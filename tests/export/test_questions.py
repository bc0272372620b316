"""Questions for a proof: the run's validation data, else its training data, else general ones."""

import json

import pytest

from lorasmith.errors import DataError
from lorasmith.export.questions import GENERAL, held_out_questions, read_questions
from lorasmith.model.base import BaseRef
from lorasmith.model.run_record import RunRecord


def record(**data):
    return RunRecord(name="r", base=BaseRef("b", None, "f"), recipe={}, settings={"data": data}, data={})


def write_rows(file, count, word):
    rows = [{"instruction": f"{word} {i}?", "input": "", "output": "yes"} for i in range(count)]
    file.write_text(json.dumps(rows))
    return str(file)


def texts(questions):
    return [question[-1].content for question in questions]


def test_validation_data_is_preferred_and_spread(tmp_path):
    train, held = write_rows(tmp_path / "t.json", 9, "train"), write_rows(tmp_path / "v.json", 9, "held")
    assert texts(held_out_questions(record(train=train, validation=held), 3)) == [
        "held 0?",
        "held 3?",
        "held 6?",
    ]
    assert texts(held_out_questions(record(train=train, validation=None), 3))[0] == "train 0?"


def test_general_questions_fill_up(tmp_path):
    train = write_rows(tmp_path / "t.json", 2, "train")
    assert texts(held_out_questions(record(train=train), 4)) == ["train 0?", "train 1?", *GENERAL[:2]]
    assert texts(held_out_questions(record(train="gone.json"), 2)) == list(GENERAL[:2])
    assert texts(held_out_questions(None, 20)) == list(GENERAL)


def test_rows_without_answers_are_questions_too(tmp_path):
    file = tmp_path / "eval.json"
    file.write_text(json.dumps([{"instruction": "Who?", "keywords": ["x"]}, {"question": "What?"}]))
    assert texts(read_questions(file)) == ["Who?", "What?"]


def test_pairs_and_labelled_conversations_have_questions_too(tmp_path):
    asked, answer = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "We."}
    rows = [
        {"chosen": [asked, answer], "rejected": [asked, {**answer, "content": "They."}]},
        {"messages": [{**asked, "content": "What?"}, answer], "label": False},
    ]
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(row) + "\n")
    found = [texts(held_out_questions(record(train=str(tmp_path / f"{n}.jsonl")), 1)) for n in (0, 1)]
    assert found == [["Who?"], ["What?"]]


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(DataError):
        read_questions(tmp_path / "none.txt")
