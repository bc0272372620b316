"""One run, judged: the facts agree in report.json, on the page and on the card, and nothing is asked twice."""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from lorasmith.errors import DataError, RunError
from lorasmith.evaluation.report import make_report, to_json, write_report
from lorasmith.evaluation.settings import ReportSettings
from lorasmith.export.merge import merge
from lorasmith.generation.decode import NextToken

FAST = {"max_answer_tokens": 5, "max_training_questions": 4}


@pytest.fixture
def run_dir(trained_run, tmp_path):
    return shutil.copytree(trained_run, tmp_path / "runs" / "faq")


@pytest.fixture
def held_out(tmp_path, training_rows):
    """Six new questions, one with keywords, one with mark-up; and one that was trained on."""
    rows = [{"instruction": f"How much is {i} plus {i}?", "output": f"It is {2 * i}."} for i in range(4)]
    rows.append({"instruction": "Who?", "output": "Nobody.", "keywords": ["nobody", ["a", "the"]]})
    rows.append({"instruction": "What is <script>alert(1)</script>?", "output": "A & B."})
    rows.append({"instruction": training_rows[3]["instruction"].upper(), "output": "x"})
    file = tmp_path / "held_out.json"
    file.write_text(json.dumps(rows))
    return file


class Page(HTMLParser):
    """What a browser would fetch, and the text that it would show."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.ids, self.linked, self.open, self.shown = [], set(), set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.fetched += [attrs[name] for name in ("src", "data", "action", "poster") if name in attrs]
        if tag == "link":
            self.fetched.append(attrs["href"])
        if tag == "a":
            self.linked.add(attrs["href"])
        self.ids |= {attrs["id"]} if "id" in attrs else set()
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.shown += data


def test_the_facts_are_the_same_wherever_they_are_told(run_dir, held_out):
    merge(run_dir, run_dir.parent / "merged")
    settings = ReportSettings(data=(str(held_out),), **FAST)
    report = make_report(run_dir, settings, device="cpu")
    page_file = write_report(run_dir, report)
    facts = json.loads((run_dir / "report.json").read_text())
    page, card = Page(page_file.read_text()), (run_dir / "README.md").read_text()

    assert facts == json.loads(json.dumps(to_json(report)))
    assert facts["verdict"]["sentence"] in page.shown
    assert facts["verdict"]["sentence"] in card
    for reason in facts["verdict"]["reasons"]:
        assert reason["text"] in page.shown
        assert reason["text"] in card
    held = facts["held_out"]
    assert held["sets"] == [
        {
            "name": "held_out.json",
            "kind": "held-out file",
            "rows": 7,
            "asked": 6,
            "leaked": [
                {
                    "question": "WHAT IS 3 PLUS 3?",
                    "where": "held_out.json row 7",
                    "trained_at": "faq.json row 4",
                }
            ],
        }
    ]
    assert "WHAT IS 3 PLUS 3?" in page.shown
    assert [len(held[side]["records"]) for side in ("base", "tuned", "merged")] == [6, 6, 6]
    assert [r["answer"] for r in held["merged"]["records"]] == [r["answer"] for r in held["tuned"]["records"]]
    assert held["compared"]["both"] + held["compared"]["lost"] == held["base"]["right"]["k"]
    assert len(facts["probe"]["base"]["records"]) == 60
    assert f"{held['tuned']['right']['k']} of 6" in card
    assert len(facts["trained"]["records"]) == 4
    assert facts["metrics"][-1]["validation_loss"] > 0
    assert facts["receipt"]["used"] == 24
    assert facts["settings"]["ship_right"] == 0.8
    assert report.record.base.fingerprint in page.shown


def test_the_page_needs_nothing_but_itself(run_dir, held_out):
    page = Page(
        write_report(run_dir, make_report(run_dir, ReportSettings(data=(str(held_out),), **FAST))).read_text()
    )
    text = (run_dir / "report.html").read_text()
    assert page.fetched == []
    assert "http://" not in text
    assert "https://" not in text
    assert "default-src 'none'" in text
    assert not re.search(r"@import|url\(", text)
    assert {link for link in page.linked if link[1:] not in page.ids} == set()
    assert "<script>alert(1)</script>" not in text
    assert "What is <script>alert(1)</script>?" in page.shown


def test_nothing_is_asked_twice(run_dir, held_out, monkeypatch):
    settings = ReportSettings(data=(str(held_out),), **FAST)
    first = make_report(run_dir, settings)
    monkeypatch.setattr(NextToken, "__call__", None)
    monkeypatch.setattr("lorasmith.engine.forward.PackForward.summed_loss", None)
    again = make_report(run_dir, settings)
    assert (again.held_out, again.probe, again.verdict) == (first.held_out, first.probe, first.verdict)


def test_without_a_file_the_validation_share_is_asked(run_dir, training_rows):
    report = make_report(run_dir, ReportSettings(**FAST))
    (shown,) = report.held_out.sets
    assert (shown.kind, shown.num_rows, shown.leaked) == ("validation share", 6, ())
    assert report.trained_of == 18
    asked = {row.question for row in report.held_out.rows}
    trained = {record.question for record in report.trained.records}
    assert not asked & trained
    assert asked | trained < {row["instruction"] for row in training_rows}
    assert report.notes == ()


def forget_the_share(run_dir):
    record = json.loads((run_dir / "run.json").read_text())
    record["settings"]["training"]["validation_share"] = 0.0
    (run_dir / "run.json").write_text(json.dumps(record))


def test_with_nothing_held_out_the_report_says_what_is_missing(run_dir):
    forget_the_share(run_dir)
    report = make_report(run_dir, ReportSettings(**FAST))
    page = Page(write_report(run_dir, report).read_text())
    assert report.held_out is None
    assert report.verdict.word != "ship"
    missing = next(reason for reason in report.verdict.reasons if reason.about == "Right answers")
    assert missing.level == "look closer"
    assert "lorasmith report --run RUN --data FILE" in page.shown
    assert any(reason.about == "Stop test" for reason in report.verdict.reasons)


def test_training_data_that_is_gone_or_changed_is_said(run_dir, held_out, trained_run):
    record = json.loads((run_dir / "run.json").read_text())
    data = run_dir.parent / "changed.json"
    shutil.copy(record["settings"]["data"]["train"], data)
    data.write_text(data.read_text().replace("It is 4.", "It is four."))
    for train, note in ((str(data), "has changed since"), ("/nowhere/faq.json", "cannot be read")):
        record["settings"]["data"]["train"] = train
        (run_dir / "run.json").write_text(json.dumps(record))
        report = make_report(run_dir, ReportSettings(data=(str(held_out),), **FAST))
        assert note in report.notes[0]
        assert note in Page(write_report(run_dir, report).read_text()).shown
    assert report.held_out.copying is None
    assert report.trained is None


def test_what_cannot_be_reported(run_dir, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        make_report(run_dir, ReportSettings(data=("missing.json",)))
    with pytest.raises(RunError, match="was not written by lorasmith merge"):
        make_report(run_dir, ReportSettings(), merged=tmp_path)
    merge(run_dir, tmp_path / "merged")
    values = json.loads((tmp_path / "merged" / "lorasmith.json").read_text())
    values["adapter"]["sha256"] = "0" * 64
    (tmp_path / "merged" / "lorasmith.json").write_text(json.dumps(values))
    with pytest.raises(RunError, match="a merge of another adapter"):
        make_report(run_dir, ReportSettings(), merged=tmp_path / "merged")
    record = json.loads((run_dir / "run.json").read_text())
    (run_dir / "run.json").write_text(json.dumps({**record, "result": None}))
    with pytest.raises(RunError, match="has not been trained to its end"):
        make_report(run_dir, ReportSettings())
