"""evaluate: runs, whole models, endpoints; what cannot be measured is said by name."""

import json
import threading
from pathlib import Path

import pytest

from lorasmith.cli.evaluate import command
from lorasmith.errors import SettingsError
from lorasmith.evaluation.perplexity import answer_surprise
from lorasmith.evaluation.questions import read_evaluation_rows
from lorasmith.generation.chat import open_chat
from tests.evaluation.test_endpoint import Server

ON_CPU = {"device": "cpu", "dtype": "float32"}


@pytest.fixture
def data(tmp_path):
    rows = [
        {"instruction": "q1", "output": "Answer to q1", "keywords": ["q1"]},
        {"instruction": "q2", "output": "x"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path / "rows.json"


def test_a_run_and_its_base(data, trained_run, tmp_path, capsys):
    command(run=trained_run, data=data, compare=True, max_tokens=4, out=tmp_path / "out.json", **ON_CPU)
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out.json").read_text())
    assert list(results) == ["base", "tuned"]
    chat, rows = open_chat(trained_run, **ON_CPU), read_evaluation_rows(data)
    for name, side in (("base", chat.base()), ("tuned", chat)):
        assert results[name]["surprise"]["loss"] == pytest.approx(answer_surprise(side, rows).loss)
        assert len(results[name]["records"]) == 2
    for text in (
        "right answers",
        "95% interval",
        "exact match",
        "ROUGE-L",
        "chrF",
        "perplexity",
        "base",
        "tuned",
    ):
        assert text in printed
    assert "chance alone" in printed or "Training has changed nothing" in printed


def test_a_whole_model(data, tiny_base_folder, capsys):
    command(model=str(tiny_base_folder), data=data, max_tokens=4, limit=1, **ON_CPU)
    assert "0 of 1 (0%)" in capsys.readouterr().out


def test_an_endpoint_has_no_loss(data, capsys):
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
        command(endpoint=server.url, data=data)
        server.shutdown()
    printed = capsys.readouterr().out
    assert "1 of 2 (50%)" in printed
    assert printed.count("not known of an endpoint") == 2


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ({}, "Name one thing to evaluate"),
        ({"run": Path("a"), "endpoint": "http://b"}, "Name one thing to evaluate"),
        (
            {"run": Path("a"), "data": Path("q"), "endpoint_model": "b"},
            "--endpoint-model b .* Add --endpoint",
        ),
        ({"run": Path("a")}, "Nothing to ask"),
        ({"endpoint": "http://b", "tasks": "arc_easy"}, "which an endpoint does not give"),
        ({"endpoint": "http://b", "data": Path("c"), "compare": True}, "does not say what its base is"),
        (
            {"endpoint": "http://b", "data": Path("c"), "device": "cpu", "base_model": "d"},
            "--base-model and --device would be ignored beside --endpoint. Leave them out",
        ),
    ],
)
def test_what_cannot_be_evaluated(words, fault):
    with pytest.raises(SettingsError, match=fault):
        command(**words)
