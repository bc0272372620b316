"""The card says what was recorded, and nothing more."""

from lorasmith.export.card import make_card, write_card
from lorasmith.model.base import BaseRef
from lorasmith.model.run_record import RunRecord, write_run_record


def record(result=None, revision=None, source="faq.json"):
    return RunRecord(
        name="faq",
        base=BaseRef("owner/model", revision, "abc" * 20),
        recipe={"name": "chat", "stop": ["END"]},
        settings={"method": {"r": 16, "lora_alpha": 32}, "training": {"epochs": 3}},
        data={"source": source, "num_examples": 1500},
        result=result,
    )


def test_finished_run_is_described_and_opens_as_markdown(tmp_path):
    write_run_record(tmp_path, record({"steps": 20, "final_loss": 0.51234, "validation_loss": None}))
    write_card(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for row in ("| Examples | 1,500 |", "| Rank, alpha | 16, 32 |", "| Loss of the last step | 0.5123 |"):
        assert row in card
    assert "Validation loss" not in card
    assert "stops at `END`" in card


def test_the_front_matter_names_a_base_of_the_hub_only():
    assert "base_model: owner/model" in make_card(record(revision="c0ffee")).split("---")[1]
    assert "base_model" not in make_card(record()).split("---")[1]


def test_an_unfinished_run_says_so():
    assert "has not been finished" in make_card(record())


def test_a_value_cannot_break_the_table():
    assert "| Data | a\\|b c |" in make_card(record(source="a|b\nc"))
