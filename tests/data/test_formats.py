"""Formats: one row in each, and what becomes of rows that are not as they should be."""

import pytest

from lorasmith.data.example import Message
from lorasmith.data.formats import FORMATS, RowProblem, detect_format, explain_unknown


def read(format_name, fields):
    return FORMATS[format_name].read(fields)


def turns(*pairs, role="role", content="content"):
    return [{role: r, content: c} for r, c in pairs]


@pytest.mark.parametrize("context", [{}, {"input": None}, {"input": ""}, {"input": " \n"}])
def test_alpaca_without_an_input(context):
    fields = {"instruction": "Q", "output": " A\n", "extra": object(), **context}
    assert read("alpaca", fields) == (Message("user", "Q"), Message("assistant", " A\n"))


def test_alpaca_with_an_input():
    assert read("alpaca", {"instruction": "Q", "input": "I", "output": "A"})[0] == Message("user", "Q", "I")


def test_messages_of_several_turns():
    rows = turns(("system", "S"), ("user", "Q"), ("assistant", "A"), ("user", "Q2"), ("assistant", "A2"))
    messages = read("messages", {"messages": rows})
    assert [(m.role, m.content) for m in messages] == [(r["role"], r["content"]) for r in rows]


def test_an_empty_system_turn_is_left_out():
    rows = turns(("system", ""), ("user", "Q"), ("assistant", "A"))
    assert read("messages", {"messages": rows}) == (Message("user", "Q"), Message("assistant", "A"))


def test_content_in_text_parts_is_joined():
    parts = [{"type": "text", "text": "Q"}, {"type": "text", "text": "?"}]
    assert read("messages", {"messages": turns(("user", parts), ("assistant", "A"))})[0] == Message(
        "user", "Q?"
    )


@pytest.mark.parametrize(("human", "gpt"), [("human", "gpt"), ("user", "assistant"), ("human", "chatgpt")])
def test_sharegpt_names_are_mapped(human, gpt):
    rows = turns((human, "Q"), (gpt, "A"), role="from", content="value")
    assert read("sharegpt", {"conversations": rows}) == (Message("user", "Q"), Message("assistant", "A"))


def test_prompt_and_completion_as_text_or_as_messages():
    expected = (Message("user", "Q"), Message("assistant", "A"))
    assert read("prompt_completion", {"prompt": "Q", "completion": "A"}) == expected
    fields = {"prompt": turns(("user", "Q")), "completion": turns(("assistant", "A"))}
    assert read("prompt_completion", fields) == expected


SKIPPED = [
    ("alpaca", {"instruction": "Q"}, "missing answer"),
    ("alpaca", {"output": "A"}, "missing instruction"),
    ("alpaca", {"instruction": "Q", "output": None}, "null answer"),
    ("alpaca", {"instruction": None, "output": "A"}, "null instruction"),
    ("alpaca", {"instruction": "Q", "output": ""}, "empty answer"),
    ("alpaca", {"instruction": " \t\n", "output": "A"}, "empty instruction"),
    ("alpaca", {"instruction": "Q", "output": 5}, "answer is not text"),
    ("alpaca", {"instruction": ["Q"], "output": "A"}, "instruction is not text"),
    ("alpaca", {"instruction": "Q", "input": 5, "output": "A"}, "input is not text"),
    ("alpaca", {"instruction": "Q", "output": "\ud83e"}, "lone surrogate"),
    ("prompt_completion", {"prompt": "Q"}, "missing answer"),
    ("messages", {"messages": []}, "missing answer"),
    ("messages", {"messages": turns(("user", "Q"))}, "missing answer"),
    ("messages", {"messages": turns(("user", "Q"), ("assistant", "A"), ("user", "Q2"))}, "missing answer"),
    ("messages", {"messages": turns(("assistant", "A"))}, "missing instruction"),
    ("messages", {"messages": turns(("user", "Q"), ("assistant", ""))}, "empty answer"),
    ("messages", {"messages": turns(("user", ""), ("assistant", "A"))}, "empty instruction"),
    ("messages", {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant"}]}, "missing answer"),
    (
        "messages",
        {"messages": turns(("user", [{"type": "image"}]), ("assistant", "A"))},
        "instruction is not text",
    ),
]
WRONG = [
    ("alpaca", {"messages": turns(("user", "Q"), ("assistant", "A"))}, "another schema"),
    ("alpaca", {"text": "x"}, "another schema"),
    ("alpaca", {}, "another schema"),
    ("alpaca", {"instruction": "Q\x00", "output": "A"}, "control character"),
    ("alpaca", {"instruction": "Q", "output": "\x1b[31mA"}, "control character"),
    ("messages", {"messages": "Q"}, "another schema"),
    ("messages", {"messages": ["Q"]}, "another schema"),
    ("messages", {"messages": turns(("user", "Q"), ("tool", "A"))}, "unknown role"),
    ("messages", {"messages": turns((None, "Q"))}, "unknown role"),
]


@pytest.mark.parametrize(("format_name", "fields", "reason"), SKIPPED)
def test_rows_with_nothing_to_learn_are_skipped(format_name, fields, reason):
    with pytest.raises(RowProblem) as caught:
        read(format_name, fields)
    assert (caught.value.reason, caught.value.is_error) == (reason, False)


@pytest.mark.parametrize(("format_name", "fields", "reason"), WRONG)
def test_rows_that_somebody_must_look_at_are_errors(format_name, fields, reason):
    with pytest.raises(RowProblem) as caught:
        read(format_name, fields)
    assert (caught.value.reason, caught.value.is_error) == (reason, True)


def test_the_format_is_known_by_its_keys():
    for name, f in FORMATS.items():
        detected = detect_format(dict.fromkeys([*f.keys, "id"], "x"), f.kind)
        assert detected is not None
        assert detected.name == name
    assert detect_format({"question": "x", "answer": "y"}) is None
    assert detect_format({"conversations": [], "chosen": {}, "rejected": {}}) is None


def test_an_unknown_row_is_told_the_nearest_format():
    text = explain_unknown({"instructions": "x", "outputs": "y"})
    assert "keys found: instructions, outputs" in text
    assert "nearest format is Alpaca rows (instruction, output)" in text
    assert "preference rows" in explain_unknown({"prompt": "", "chosen": "", "rejected": ""})
    judged = {"text": "x", "prompt": "Why?", "completion": "So.", "label": True}
    assert detect_format(judged, "documents") is None
    assert "kto learns answers. If its text is to be learnt" in explain_unknown(judged, "documents")


def test_a_text_may_have_a_class_as_its_label():
    for label in (1, True, "positive"):
        found = detect_format({"text": "A good film.", "label": label}, "documents")
        assert found is FORMATS["text"]
