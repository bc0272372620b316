"""Questions come from any data format; keywords may be alternatives; wrong rows are named."""

import json

import pytest

from lorasmith.data.example import Message
from lorasmith.errors import DataError
from lorasmith.evaluation.questions import (
    EvaluationRow,
    ask,
    name_keywords,
    read_evaluation_rows,
    spread_evenly,
)


def write(folder, *rows):
    file = folder / "rows.json"
    file.write_text(json.dumps(rows))
    return file


def test_rows_of_every_format_are_read(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    more = [*turns, {"role": "user", "content": "When?"}, {"role": "assistant", "content": "On the 1st."}]
    file = write(tmp_path, {"messages": turns}, {"messages": more, "keywords": ["1st", ["a", "b"]]})
    short, long = read_evaluation_rows(file)
    assert short == EvaluationRow((Message("user", "Hi"),), "Hello.", (), "rows.json row 1")
    assert [message.content for message in long.asked] == ["Hi", "Hello.", "When?"]
    assert (long.question, long.reference) == ("When?", "On the 1st.")
    assert name_keywords(long.keywords) == ["1st", "a or b"]


def test_an_alpaca_row_keeps_its_input(tmp_path):
    (row,) = read_evaluation_rows(write(tmp_path, {"instruction": "c?", "input": "ctx", "output": "d"}))
    assert row.asked == (Message("user", "c?", "ctx"),)
    assert row.as_example().messages[-1] == Message("assistant", "d")


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"instruction": "a?"}, r"rows.json:1: no question with a reference answer. keys found: instruction"),
        ({"instruction": "a?", "output": " "}, "rows.json:1: empty answer"),
        ({"instruction": "a?", "output": "b", "keywords": "b"}, "\"keywords\" is 'b'"),
        ({"instruction": "a?", "output": "b", "keywords": [""]}, "must be a list of texts"),
        ({"instruction": "a?", "output": "b", "keywords": [[]]}, "any of which will do"),
    ],
)
def test_wrong_rows_are_named(tmp_path, row, fault):
    with pytest.raises(DataError, match=fault):
        read_evaluation_rows(write(tmp_path, row))


def test_a_file_without_questions_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no question to ask"):
        read_evaluation_rows(write(tmp_path))


def test_rows_are_spread_evenly():
    assert spread_evenly(range(100), 4) == [0, 25, 50, 75]
    assert spread_evenly(range(3), 4) == [0, 1, 2]
    assert ask("a?", "b").where == ""
