"""Answers are kept as soon as they are there, and asked again only of other weights or with another limit."""

import pytest

from conftest import make_tiny_model
from lorasmith.data.example import Message
from lorasmith.data.prompts import choose_recipe
from lorasmith.data.settings import PromptSettings
from lorasmith.evaluation.store import KeptChat
from lorasmith.generation.chat import Chat, open_chat
from lorasmith.generation.sampling import SamplingSettings

SHORT = SamplingSettings(max_tokens=5)
QUESTIONS = [[Message("user", text)] for text in ("When is payday?", "Where?", "Who?")]


@pytest.fixture
def open_tiny(tiny_base_folder):
    return lambda: KeptChat(open_chat(str(tiny_base_folder), device="cpu", dtype="float32"))


def test_a_second_chat_over_the_same_weights_asks_nothing(open_tiny, monkeypatch):
    first = open_tiny()
    answers = first.ask_many(QUESTIONS, sampling=SHORT)
    assert [a.text for a in answers] == [first.chat.ask(q, sampling=SHORT).text for q in QUESTIONS]
    second, told = open_tiny(), []
    monkeypatch.setattr("lorasmith.generation.decode.NextToken.__call__", None)  # no forward can be made
    again = second.ask_many(QUESTIONS, sampling=SHORT, on_answer=lambda *at: told.append(at))
    assert (again, second.num_looked_up, told) == (answers, 3, list(enumerate(answers)))


def test_only_what_is_new_is_asked_and_the_order_stays(open_tiny):
    open_tiny().ask_many(QUESTIONS[1:2], sampling=SHORT)
    side = open_tiny()
    answers = side.ask_many(QUESTIONS, sampling=SHORT)
    assert side.num_looked_up == 1
    assert [a.text for a in answers] == [side.chat.ask(q, sampling=SHORT).text for q in QUESTIONS]


def test_another_limit_is_another_answer(open_tiny):
    open_tiny().ask_many(QUESTIONS, sampling=SHORT)
    side = open_tiny()
    assert {
        a.completion_tokens for a in side.ask_many(QUESTIONS, sampling=SamplingSettings(max_tokens=7))
    } == {7}
    assert side.num_looked_up == 0


def test_a_report_that_was_killed_goes_on_where_it_was(open_tiny, monkeypatch):
    class KilledError(Exception):
        pass

    def die(place, answer):
        raise KilledError

    with pytest.raises(KilledError):
        open_tiny().ask_many(QUESTIONS, sampling=SHORT, on_answer=die)
    (file,) = open_tiny()._file.parent.iterdir()
    file.write_bytes(file.read_bytes() + b'\n["half a line')
    side = open_tiny()
    assert len(side.ask_many(QUESTIONS, sampling=SHORT)) == 3
    assert side.num_looked_up == 1
    assert open_tiny().ask_many(QUESTIONS, sampling=SHORT) == side.ask_many(QUESTIONS, sampling=SHORT)


def test_a_value_is_computed_once(open_tiny):
    assert open_tiny().remember(["loss", 1], lambda: {"loss": 0.5}) == {"loss": 0.5}
    assert open_tiny().remember(["loss", 1], lambda: pytest.fail("computed again")) == {"loss": 0.5}


def test_a_model_that_was_handed_in_keeps_nothing(tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("LORASMITH_CACHE", str(tmp_path / "cache"))
    recipe, _ = choose_recipe(PromptSettings(), tiny_tokenizer)
    side = KeptChat(Chat(make_tiny_model("llama"), tiny_tokenizer, recipe))
    side.ask_many(QUESTIONS, sampling=SHORT)
    assert not (tmp_path / "cache" / "evaluation").exists()
