"""Leaks are found whatever their capitals; copying is measured in runs of words."""

import pytest

from lorasmith.data.example import Example, Message
from lorasmith.evaluation.overlap import find_leaks, measure_copying
from lorasmith.evaluation.questions import EvaluationRow

LONG = "the community all hands is held on friday at the end of each month on a discord stage"


def example(question, answer, where, context=""):
    return Example((Message("user", question, context), Message("assistant", answer)), where)


def row(question, where, context=""):
    return EvaluationRow((Message("user", question, context),), "x", (), where)


TRAINING = [example("When is payday?", "On the 1st.", "train:1"), example("What?", LONG, "train:2")]


def test_a_question_that_was_trained_on_is_found_and_named():
    rows = [row("when is PAYDAY", "a:1"), row("When is the payday?", "a:2"), row("  When is payday ?", "b:1")]
    assert find_leaks(rows, TRAINING) == {0: "train:1", 2: "train:1"}
    assert find_leaks(rows, []) == {}


def test_the_same_instruction_on_another_input_is_another_question():
    trained = [example("Sum up.", "x", "train:1", "one text")]
    assert find_leaks([row("Sum up.", "a:1", "another text")], trained) == {}
    assert find_leaks([row("Sum up.", "a:1", "One text.")], trained) == {0: "train:1"}


def test_a_system_prompt_makes_no_other_question():
    asked = (Message("system", "Be kind."), Message("user", "When is payday?"))
    assert find_leaks([EvaluationRow(asked, "x", (), "a:1")], TRAINING) == {0: "train:1"}


def test_a_question_is_found_in_a_plain_text_as_whole_words():
    text = Example((Message("part", "1. Pay\n**How often do we get PAID?**\nTwice a month."),), "faq.md:1")
    rows = [
        row("How often do we get paid", "a:1"),
        row("ow often do we get paid", "a:2"),
        row("get paid?", "a:3"),  # too short to say anything
    ]
    assert find_leaks(rows, [text]) == {0: "faq.md:1"}


@pytest.mark.parametrize(
    ("answer", "share", "whole_of"),
    [
        (LONG.capitalize() + "!", 1.0, "train:2"),
        ("On the 1st.", 0.0, "train:1"),  # too short for a run, and yet the whole of an answer
        ("It is held on friday at the end of each month, they say.", 10 / 13, None),
        ("Held on friday at the end of the month.", 0.0, None),
        ("", 0.0, None),
    ],
)
def test_copying(answer, share, whole_of):
    (copying,) = measure_copying([answer], TRAINING)
    assert (copying.share, copying.whole_of) == (pytest.approx(share), whole_of)
