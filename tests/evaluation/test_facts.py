"""Near misses are misses: a wrong number, another weekday, a lost name, a turned verdict."""

import pytest

from lorasmith.evaluation.facts import (
    agrees_with,
    find_facts,
    has_keywords,
    is_verbatim,
    missing_facts,
)


@pytest.mark.parametrize(
    ("answer", "keywords", "expected"),
    [
        ("The company pays 50%.", ["5"], False),
        ("It takes 1.5 hours.", ["5"], False),
        ("Room B5 is yours.", ["5"], False),
        ("You get 5 ICY.", ["5"], True),
        ("You get 5 ICY.", ["5 icy"], True),
        ("On FRIDAYS, on Discord.", ["friday", "discord"], True),
        ("On Fridays.", ["friday", "discord"], False),
        ("Six 8-week cycles.", ["8-week", "six"], True),
        ("It costs $300.", ["300"], True),
        ("It costs $3000.", ["300"], False),
        ("A c++ course (c++).", ["c++"], True),
        ("It has four legs.", [("4", "four"), "leg"], True),
        ("It has 4 legs.", [("4", "four"), "leg"], True),
        ("It has 14 legs.", [("4", "four"), "leg"], False),
    ],
)
def test_keywords(answer, keywords, expected):
    assert has_keywords(keywords, answer) is expected


def test_verbatim_ignores_the_amount_of_white_space_only():
    assert is_verbatim("The 1st or the 15th.", "The 1st\nor  the 15th. ")
    assert not is_verbatim("The 1st or the 15th.", "the 1st or the 15th.")


def test_the_facts_of_a_reference():
    reference = (
        "No. Daily updates go to #daily twice a week by 10 am, and OGIF is on Friday in Saigon; "
        "type 'gm' or `/tip` for $300, six times in March."
    )
    assert set(find_facts(reference)) == {
        "10 am", "$300", "6", "twice", "friday", "march", "ogif", "saigon", "gm", "/tip", "#daily",
    }  # fmt: skip


REFERENCE = "The stipend is $300 a year, paid on Friday by Tieubao, for up to six months and 5% of the pool."


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (REFERENCE, True),
        (REFERENCE.replace("six", "6"), True),
        (REFERENCE + " You may ask for it.", True),
        (REFERENCE.replace("$300", "$30"), False),
        (REFERENCE.replace("$300", "$3000"), False),
        (REFERENCE.replace("$300", "300"), False),
        (REFERENCE.replace("Friday", "Thursday"), False),
        (REFERENCE.replace("on Friday ", ""), False),
        (REFERENCE.replace("Tieubao", "Huy"), False),
        (REFERENCE.replace("six", "five"), False),
        (REFERENCE.replace("5%", "50%"), False),
        (REFERENCE.replace("5%", "15%"), False),
        (REFERENCE.replace("5%", "1.5%"), False),
        (REFERENCE.replace("is $300", "is not $300"), False),
        (
            "$300 Friday Tieubao six 5%",
            True,
        ),  # it has the facts; that it is not like the reference is seen elsewhere
        ("", False),
    ],
)
def test_near_misses_of_a_reference(answer, expected):
    assert agrees_with(REFERENCE, answer) is expected


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("Yes. It is paid at full base salary.", "No. It is paid at full base salary."),
        ("It can be swapped for a share of it.", "It can't be swapped for a share of it."),
        ("Meetings fall between 10 pm and 4 pm.", "Meetings fall between 10 am and 4 pm."),
        ("The first of the two rounds counts.", "The second of the two rounds counts."),
    ],
)
def test_a_turned_verdict_is_wrong(answer, reference):
    assert not agrees_with(reference, answer)
    assert agrees_with(reference, reference)


def test_missing_facts_are_named():
    assert missing_facts("On Thursday, six ICY.", "On Friday, 5 ICY.") == ("6", "thursday")


@pytest.mark.parametrize(("written", "other"), [("10 am", "10am"), ("10 am", "10 a.m."), ("4pm", "4 PM")])
def test_times_are_the_same_however_written(written, other):
    assert agrees_with(f"It begins at {written} sharp.", f"It begins at {other} sharp.")


def test_a_sentence_start_is_no_name_but_an_acronym_is():
    assert find_facts("Take the bus. Everyone does. OGIF waits. I'm sure.") == ("ogif",)
