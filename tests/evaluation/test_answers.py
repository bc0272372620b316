"""Counts add up, records keep their order, and each row is judged by what it has: keywords, a reference."""

import json
from dataclasses import dataclass

import pytest

from conftest import make_tiny_model
from lorasmith.data.example import Message
from lorasmith.data.prompts import choose_recipe
from lorasmith.data.settings import PromptSettings
from lorasmith.evaluation.answers import (
    AnswersReport,
    choose_max_tokens,
    evaluate_answers,
    judge_answer,
)
from lorasmith.evaluation.questions import EvaluationRow, ask
from lorasmith.evaluation.settings import ReportSettings
from lorasmith.evaluation.statistics import Count
from lorasmith.generation.chat import Chat
from lorasmith.generation.sampling import SamplingSettings

ROW = ask("When is payday?", "On the 1st, a Friday.", "1st", "friday")
NO_KEYWORDS = ask("When is payday?", "Payday is on the 1st of the month, or on a Friday in May.")


@dataclass(frozen=True)
class Given:
    text: str
    finish_reason: str = "stop"
    completion_tokens: int = 3


def judge(row, text, finish_reason="stop"):
    return judge_answer(row, Given(text, finish_reason), ReportSettings())


@pytest.mark.parametrize(
    ("row", "answer", "is_right", "judged_by"),
    [
        (ROW, "On the 1st, a Friday.", True, "keywords"),
        (ROW, "friday the 1st", True, "keywords"),
        (ROW, "friday the 15th", False, "keywords"),
        (NO_KEYWORDS, NO_KEYWORDS.reference, True, "exact match"),
        (NO_KEYWORDS, "Payday is on the 1st of each month, or on a Friday in May.", True, "likeness"),
        (NO_KEYWORDS, "Payday is on the 2nd of the month, or on a Friday in May.", False, "likeness"),
        (NO_KEYWORDS, "Payday is not on the 1st of the month, or on a Friday in May.", False, "likeness"),
        (NO_KEYWORDS, "May: a Friday. Or else, 1st.", False, "likeness"),
    ],
)
def test_an_answer_is_judged(row, answer, is_right, judged_by):
    record = judge(row, answer)
    assert (record.is_right, record.judged_by) == (is_right, judged_by)


def test_the_thresholds_of_likeness_are_those_of_the_settings():
    answer = Given("Payday is on the 1st, or on a Friday in May.")
    strict = ReportSettings(min_rouge_l=0.99, min_chrf=99)
    assert not judge_answer(NO_KEYWORDS, answer, strict).is_right
    assert judge_answer(NO_KEYWORDS, answer, strict.model_copy(update={"min_rouge_l": 0.8})).is_right
    assert judge_answer(NO_KEYWORDS, answer, strict.model_copy(update={"min_chrf": 70})).is_right


def test_counts():
    report = AnswersReport(
        (
            judge(ROW, "On the 1st, a Friday."),
            judge(ROW, "the 1st, friday, and on and on", "length"),
            judge(NO_KEYWORDS, "never"),
        )
    )
    assert (report.right, report.verbatim, report.stopped) == (Count(2, 3), Count(1, 3), Count(2, 3))
    assert report.with_keywords == Count(2, 2)
    assert json.loads(json.dumps(report.to_json()))["stopped"] == {"k": 2, "n": 3}
    assert AnswersReport(()).right.share == 0


def test_every_question_is_asked_as_chat_asks_it(tiny_tokenizer):
    recipe, _ = choose_recipe(PromptSettings(recipe="alpaca"), tiny_tokenizer)
    chat = Chat(make_tiny_model("llama"), tiny_tokenizer, recipe)
    sampling = SamplingSettings(max_tokens=6)
    rows = [ask("Hi", "x"), EvaluationRow((Message("user", "When?", "A text."),), "y"), ask("Hi", "z")]
    seen = []
    report = evaluate_answers(chat, rows, sampling=sampling, progress=lambda *at: seen.append(at))
    assert [record.reference for record in report.records] == ["x", "y", "z"]
    assert [record.answer for record in report.records] == [
        chat.ask(row.asked, sampling=sampling).text for row in rows
    ]
    assert report.records[1].question == "When?\nA text."
    assert report.stopped == Count(0, 3)
    assert seen[-1] == (3, 3)


def test_the_longest_answer_follows_the_references(tiny_tokenizer):
    rows = [ask("a?", "x " * 40), ask("b?", "y")]
    tokens = len(tiny_tokenizer("x " * 40, add_special_tokens=False).input_ids)
    assert choose_max_tokens(rows, ReportSettings(), tiny_tokenizer) == tokens + tokens // 2
    assert choose_max_tokens(rows[1:], ReportSettings(), tiny_tokenizer) == 32
    assert choose_max_tokens(rows, ReportSettings(max_answer_tokens=7), tiny_tokenizer) == 7
