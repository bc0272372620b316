"""The card says what was recorded, and nothing more."""

import pytest

from lorasmith.export.card import KINDS, make_card, write_card
from lorasmith.model.base import BaseRef
from lorasmith.model.method_settings import METHODS
from lorasmith.model.run_record import RunRecord, write_run_record


def record(result=None, revision=None, source="faq.json", method="lora", r=16):
    return RunRecord(
        name="faq",
        base=BaseRef("owner/model", revision, "abc" * 20),
        recipe={"name": "chat", "stop": ["END"]},
        settings={"method": {"name": method, "r": r, "lora_alpha": 32}, "training": {"epochs": 3}},
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


def test_whose_loss_it_is_stands_beside_it():
    of_pairs = record().model_copy(
        update={"settings": {"objective": {"name": "dpo", "beta": 0.2, "margin": None}}}
    )
    assert "| Objective | dpo, beta 0.2 |" in make_card(of_pairs)
    assert "Objective" not in make_card(record())


def test_a_value_cannot_break_the_table():
    assert "| Data | a\\|b c |" in make_card(record(source="a|b\nc"))


def test_every_method_is_called_by_its_name():
    assert KINDS.keys() == METHODS.keys()


@pytest.mark.parametrize(
    ("method", "says", "library"),
    [
        ("lora", "A LoRA adapter for owner/model", "peft"),
        ("ia3", "An IA3 adapter for owner/model", "peft"),
        ("full", "All weights of owner/model", "transformers"),
    ],
)
def test_the_card_says_what_was_trained_and_what_opens_it(method, says, library):
    card = make_card(record(method=method))
    assert says in card
    assert f"library_name: {library}" in card


def test_a_pushed_card_says_how_to_ask_it_elsewhere():
    card = make_card(record(revision="c0ffee"), place="anna/faq", license="mit")
    assert "license: mit" in card
    assert "base_model_relation: adapter" in card
    assert 'lorasmith ask "your question" --run anna/faq' in card
    assert "vllm serve owner/model --enable-lora --lora-modules faq=anna/faq" in card
    assert 'PeftModel.from_pretrained(base, "anna/faq")' in card
    assert "vllm" not in make_card(record(revision="c0ffee", method="vera"), place="anna/faq")
    assert "export" not in make_card(record(method="prompt"), place="anna/faq")
    assert "vllm serve anna/faq" in make_card(record(), place="anna/faq", is_merged=True)


@pytest.mark.parametrize(
    ("method", "r", "says"), [("lora", 4, ""), ("pissa", 16, "32"), ("lora", 17, "32"), ("lora", 600, None)]
)
def test_vllm_is_told_of_a_rank_above_its_default(method, r, says):
    card = make_card(record(revision="c0ffee", method=method, r=r), place="anna/faq")
    option = f" --max-lora-rank {says}" if says else ""
    command = f"vllm serve owner/model --enable-lora{option} --lora-modules faq=anna/faq"
    assert (command in card) == (says is not None)
    assert ("vllm" in card) == (says is not None)
