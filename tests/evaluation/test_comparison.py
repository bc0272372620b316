"""Runs side by side: their order, what is said of the best one, and what is written."""

import json
from dataclasses import replace

import pytest

from lorasmith.errors import RunError
from lorasmith.evaluation.comparison import (
    HEADER,
    Entry,
    Untuned,
    check_asked_alike,
    rank,
    read_entry,
    tell_best,
    write_comparison,
)
from lorasmith.evaluation.statistics import Count

NOTHING = Untuned(5.0, (False,) * 40)


def entry(name, right, *, loss=1.0, stopped=40, general=(50, 48), saved=2**20, peak=2**30, seconds=100.0):
    is_right = (True,) * right + (False,) * (40 - right)
    counts = (Count(stopped, 40), general, 1.1, 4096, saved, peak, seconds, 1000)
    return Entry(name, name, 1e-3, loss, "the same", is_right, *counts)


def test_the_best_is_right_most_often_and_then_surest():
    entries = [entry("a", 20), entry("b", 30, loss=0.9), entry("c", 30, loss=0.8)]
    assert [e.name for e in rank(entries)] == ["c", "b", "a"]


def test_the_best_is_told_with_what_the_questions_cannot_tell():
    ranked = [entry("dora", 30), entry("lora", 28, seconds=40.0), entry("ia3", 5, loss=2.0)]
    text = "\n".join(tell_best(ranked, NOTHING))
    assert text.startswith(
        "Best: dora, with 30 of 40 (75%) of the held-out answers right and a loss of 1.000."
    )
    assert "It is clearly better than ia3." in text
    assert "40 questions are too few to tell it from lora." in text
    assert "Of these lora takes the least time: 40 s, where dora takes 100 s." in text
    assert "least memory" not in text
    assert "But" not in text


def test_what_speaks_against_the_best_is_told_too():
    ranked = [entry("full", 2, stopped=30, general=(50, 20)), entry("lora", 1)]
    text = "\n".join(tell_best(ranked, NOTHING))
    assert "It is not clearly better than the untuned base, which has 0 of 40 (0%) right." in text
    assert "But only 30 of 40 (75%) of its answers end by themselves" in text
    assert "But it forgets: of the general questions 50 were answered right before, 20 after." in text
    assert "LoRA reaches 50% of full fine-tuning's right answers." in text


def test_a_comparison_is_written_for_people_and_machines(tmp_path):
    ranked = [entry("lora", 30), entry("a_b", 5)]
    write_comparison(tmp_path, ranked, NOTHING, {"full": "no memory"})
    values = json.loads((tmp_path / "comparison.json").read_text())
    assert [run["right"]["k"] for run in values["runs"]] == [30, 5]
    assert values["failed"] == {"full": "no memory"}
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    assert lines[0].split(" | ")[1:3] == ["rate", "loss"]
    assert {line.count("|") for line in lines[:5]} == {len(HEADER) + 1}
    assert lines[-1] == "full failed: no memory"
    assert (tmp_path / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_runs_that_were_asked_different_questions_are_not_compared():
    first, other = entry("lora", 3), replace(entry("dora", 3), asked="others")
    check_asked_alike(first, entry("dora", 3))
    with pytest.raises(RunError, match=r"dora was asked other questions than lora.*lorasmith report --run"):
        check_asked_alike(first, other)


def test_a_run_without_a_report_is_no_entry(trained_run):
    with pytest.raises(RunError, match=r"has no report. Make it: lorasmith report --run"):
        read_entry("faq", trained_run)
