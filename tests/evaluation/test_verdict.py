"""Each threshold decides at its border, too few questions are said to be too few, the worst reason wins."""

import pytest

from lorasmith.evaluation.answers import AnswerRecord, AnswersReport
from lorasmith.evaluation.perplexity import Surprise
from lorasmith.evaluation.settings import ReportSettings
from lorasmith.evaluation.statistics import Comparison, Count
from lorasmith.evaluation.verdict import (
    Reason,
    decide,
    judge_against_base,
    judge_forgetting,
    judge_leakage,
    judge_merged,
    judge_right,
    judge_stopping,
    judge_text,
    judge_validation,
)

SETTINGS = ReportSettings()
STOPPING = {"truncated": 0, "max_tokens": 60, "longest_reference": 40}


def test_the_worst_reason_decides_and_stands_first():
    good, look = Reason("a", "good", "all is well", ""), Reason("b", "look closer", "this is odd", "")
    bad, worse = Reason("c", "do not ship", "it runs on", ""), Reason("d", "do not ship", "it is wrong", "")
    assert decide([good]).sentence == "Ship: all is well."
    assert decide([good, look]).word == "look closer"
    verdict = decide([good, bad, look, worse])
    assert verdict.sentence == "Do not ship: it runs on, and it is wrong."
    assert [reason.about for reason in verdict.reasons] == ["c", "d", "b", "a"]


@pytest.mark.parametrize(("k", "level"), [(95, "good"), (94, "do not ship"), (100, "good")])
def test_the_stop_test_is_a_gate_at_95_percent(k, level):
    assert judge_stopping(Count(k, 100), SETTINGS, STOPPING).level == level


def test_a_failed_stop_test_names_the_likely_causes():
    text = judge_stopping(
        Count(1, 10), SETTINGS, {"truncated": 12, "max_tokens": 30, "longest_reference": 40}
    ).text
    assert "95% are needed" in text
    assert "the longest reference has 40 tokens" in text
    assert "12 training rows were cut" in text
    assert "cut at data.max_seq_len" not in judge_stopping(Count(1, 10), SETTINGS, STOPPING).text


@pytest.mark.parametrize(
    ("right", "level", "brief"),
    [
        (Count(80, 100), "good", "80 of 100 held-out answers are right"),
        (Count(79, 100), "look closer", "only 79 of 100"),
        (Count(41, 100), "look closer", "only 41"),  # its interval reaches 50.8%
        (Count(40, 100), "do not ship", "only 40"),  # 31% to 49.8%
        (Count(19, 19), "look closer", "19 held-out questions are too few to tell"),
        (Count(0, 19), "do not ship", "only 0 of 19"),
        (Count(20, 20), "good", "20 of 20"),
    ],
)
def test_the_share_of_right_answers(right, level, brief):
    reason = judge_right(right, None, right, SETTINGS)
    assert reason.level == level
    assert brief in reason.brief


def test_hints_say_what_would_help():
    text = judge_right(Count(10, 40), Count(40, 40), Count(0, 0), SETTINGS).text
    assert "More wordings of each fact help" in text
    assert "give the rows keywords" in text
    assert "keywords" not in judge_right(Count(10, 40), None, Count(10, 40), SETTINGS).text


@pytest.mark.parametrize(
    ("gained", "lost", "level", "text"),
    [
        (6, 0, "good", "3.1%"),
        (0, 6, "do not ship", "wrong where the base is right 6 times"),
        (5, 0, "look closer", "Too few to tell"),
        (2, 2, "look closer", "Training has changed nothing"),
        (30, 0, "good", "less than 1 in 1,000"),
    ],
)
def test_against_the_base(gained, lost, level, text):
    reason = judge_against_base(Comparison(10, gained, lost, 10), SETTINGS)
    assert reason.level == level
    assert text in reason.text


@pytest.mark.parametrize(
    ("both", "gained", "lost", "level"),
    [
        (50, 0, 0, "good"),
        (45, 0, 5, "good"),  # 10% lost
        (44, 0, 6, "look closer"),  # 12%, and clear
        (45, 7, 13, "look closer"),  # 10.3% on balance, and may be chance
        (20, 0, 30, "do not ship"),
        (25, 0, 25, "look closer"),  # 50% is not yet more than half
        (5, 0, 10, "good"),  # a base that knows 15 of them cannot tell
    ],
)
def test_forgetting(both, gained, lost, level):
    assert (
        judge_forgetting(Comparison(both, gained, lost, 60 - both - gained - lost), SETTINGS).level == level
    )


def test_what_may_be_chance_is_said_to_be():
    assert "Too few to tell" in judge_forgetting(Comparison(45, 7, 13, 0), SETTINGS).text
    assert "answers too few of them" in judge_forgetting(Comparison(5, 0, 10, 45), SETTINGS).text


@pytest.mark.parametrize(("loss", "level"), [(2.22, "good"), (2.23, "look closer"), (3.11, "do not ship")])
def test_general_text(loss, level):
    assert judge_text(Surprise(2.0, 100), Surprise(loss, 100), SETTINGS).level == level  # ratio e^(loss - 2)


def answers(*texts):
    return AnswersReport(
        tuple(AnswerRecord("q", "r", text, True, "keywords", False, 0, 0, "stop", 1) for text in texts)
    )


def test_a_merged_model_must_answer_the_same():
    assert judge_merged(answers(*"abcdefghij"), answers(*"abcdefghiX")).level == "good"
    reason = judge_merged(answers(*"abcdefghij"), answers(*"abcdefghXX"))
    assert (reason.level, reason.brief) == (
        "look closer",
        "the merged model gives 2 of 10 answers differently",
    )


def test_leaks_are_told_and_many_are_a_reason_to_look():
    assert judge_leakage(3, 10).level == "good"
    assert judge_leakage(11, 10).level == "look closer"


def test_a_validation_loss_that_rises_again():
    def at(*losses):
        return [{"step": i + 1, "loss": 1.0, "validation_loss": loss} for i, loss in enumerate(losses)]

    assert judge_validation(at(3.0)) is None
    assert judge_validation(at(3.0, 2.0, 2.05)).level == "good"
    reason = judge_validation(at(3.0, 2.0, 2.5))
    assert reason.level == "look closer"
    assert "lowest at step 2" in reason.text
    assert "checkpoints/step-000002" in reason.text
