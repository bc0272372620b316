"""Counts add up, records keep their order, rows without keywords are judged by facts."""

import json

import pytest

from conftest import make_tiny_model
from lorasmith.data.prompts import choose_recipe
from lorasmith.data.settings import PromptSettings
from lorasmith.errors import DataError
from lorasmith.evaluation.answers import (
    AnswersReport,
    Count,
    EvaluationRow,
    evaluate_answers,
    judge_answer,
    read_evaluation_rows,
)
from lorasmith.generation.chat import Chat
from lorasmith.generation.sampling import SamplingSettings

ROW = EvaluationRow("When is payday?", "On the 1st, a Friday.", ("1st", "friday"))
NO_KEYWORDS = EvaluationRow("When is payday?", "On the 1st, a Friday.")


@pytest.mark.parametrize(
    ("row", "answer", "is_right", "is_verbatim"),
    [
        (ROW, "On the 1st, a Friday.", True, True),
        (ROW, "friday the 1st", True, False),
        (ROW, "friday the 15th", False, False),
        (NO_KEYWORDS, "On the 1st, a Friday.", True, True),
        (NO_KEYWORDS, "On the 1st, which is a Friday.", True, False),
        (NO_KEYWORDS, "On the 2nd, a Friday.", False, False),
    ],
)
def test_an_answer_is_judged(row, answer, is_right, is_verbatim):
    record = judge_answer(row, answer, "stop")
    assert (record.is_right, record.is_verbatim) == (is_right, is_verbatim)


def test_counts():
    report = AnswersReport(
        (
            judge_answer(ROW, "On the 1st, a Friday.", "stop"),
            judge_answer(ROW, "the 1st, friday, and on and on", "length"),
            judge_answer(ROW, "never", "stop"),
        )
    )
    assert (report.right, report.verbatim, report.stopped) == (Count(2, 3), Count(1, 3), Count(2, 3))
    assert str(report.right) == "2 of 3 (67%)"
    assert str(Count(199, 200)) == "199 of 200 (99%)"
    assert str(Count(1, 300)) == "1 of 300 (1%)"
    assert str(Count(200, 200)) == "200 of 200 (100%)"
    assert json.loads(json.dumps(report.to_json()))["stopped"] == {"k": 2, "n": 3}
    assert AnswersReport(()).right.share == 0


def test_every_question_is_asked_as_chat_asks_it(tiny_tokenizer):
    recipe, _ = choose_recipe(PromptSettings(recipe="alpaca"), tiny_tokenizer)
    chat = Chat(make_tiny_model("llama"), tiny_tokenizer, recipe)
    sampling = SamplingSettings(max_tokens=6)
    rows = [EvaluationRow("Hi", "x"), EvaluationRow("When?", "y", input="A text."), EvaluationRow("Hi", "z")]
    seen = []
    report = evaluate_answers(chat, rows, sampling=sampling, progress=lambda *at: seen.append(at))
    assert [record.reference for record in report.records] == ["x", "y", "z"]
    assert [record.answer for record in report.records] == [
        chat.ask(row.question, input=row.input, sampling=sampling).text for row in rows
    ]
    assert report.stopped == Count(0, 3)
    assert seen[-1] == (3, 3)


def test_rows_are_read_with_and_without_keywords(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(
        json.dumps(
            [
                {"instruction": "a?", "input": "", "output": "b", "keywords": ["b"]},
                {"instruction": "c?", "input": "ctx", "output": "d"},
            ]
        )
    )
    assert read_evaluation_rows(file) == [
        EvaluationRow("a?", "b", ("b",)),
        EvaluationRow("c?", "d", (), "ctx"),
    ]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"instruction": "a?"}, r"rows.json:1: .* needs \"instruction\" and \"output\""),
        ({"instruction": "a?", "output": "b", "keywords": "b"}, "\"keywords\" is 'b'"),
        ({"instruction": "a?", "output": "b", "keywords": [""]}, "must be a list of texts"),
    ],
)
def test_wrong_rows_are_named(tmp_path, row, fault):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row]))
    with pytest.raises(DataError, match=fault):
        read_evaluation_rows(file)
