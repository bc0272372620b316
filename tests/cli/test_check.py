"""What ``lorasmith check`` shows, and its exit code."""

import json
import re

import pytest
import typer

from lorasmith.cli.check import command
from lorasmith.errors import DataError, SettingsError

GOOD = [
    {"instruction": "When is payday?", "output": "On the 1st."},
    {"instruction": "Where is the office?", "output": "In [bold]Saigon[/]."},
    {"instruction": "Where is the office?", "output": "In Vietnam."},
    {"instruction": "When is payday?", "output": "On the 1st."},
    {"instruction": "Who?"},
]


@pytest.fixture
def check(tmp_path, tiny_base_folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def check(rows, **options):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
        code = 0
        try:
            command("rows.jsonl", model=str(tiny_base_folder), **options)
        except typer.Exit as stopped:
            code = stopped.exit_code
        return code, capsys.readouterr().out

    return check


def test_texts_are_shown_as_pieces(check):
    texts = [{"text": "The office is in Saigon.\n\n" * 20}, {"text": "Payday is the 1st."}]
    code, shown = check(texts, text=True, max_seq_len=64)
    assert code == 0
    assert re.search(r"2 │ used, as \d+ pieces; 1 cut where paragraphs end", shown)
    assert "texts are learnt without a template" in shown
    assert "Tokens of a piece" in shown
    assert "prompt (not learnt)" not in shown
    assert shown.rstrip().endswith("objective.name=text")


def test_a_good_one_of_labelled_answers_is_shown_and_labels_that_are_alike_are_refused(check):
    rows = [{"prompt": f"Why {n}?", "completion": f"So {n}.", "label": n > 1} for n in range(4)]
    code, shown = check(rows, labels=True)
    assert code == 0
    assert "2 answers are good (true), 2 bad (false)." in shown
    assert "What the model sees of rows.jsonl:3; what it learns" in shown
    for as_json in (False, True):
        with pytest.raises(DataError, match="all 2 answers are labelled false"):
            check(rows[:2], labels=True, as_json=as_json)


def test_rows_are_pairs_or_texts(check):
    with pytest.raises(SettingsError, match="Give one"):
        check([], text=True, pairs=True)


def test_good_rows_are_shown_and_the_code_is_0(check, tiny_base_folder):
    code, shown = check(GOOD)
    assert code == 0
    for text in (
        "3 │ used",
        "1 │ skipped: duplicate  (rows.jsonl:4)",
        "1 │ skipped: missing answer  (rows.jsonl:5)",
        "5 │ read",
        "rows.jsonl:3: same question as rows.jsonl:2, other answer",
        "Tokens of the prompt (not learnt): median",
        "Tokens of the answer (learnt): median",
        "Longest rows, in tokens: rows.jsonl:2 (",
        "Prompt recipe: chat (the tokenizer has a chat template).",
        "「On the 1st.<|im_end|>」",
        "Nothing will be cut: every example fits into max_seq_len 512.",
        "Packing, at 8 examples a step: an epoch computes",
        f"Ready to train: lorasmith train --data rows.jsonl --model {tiny_base_folder}",
    ):
        assert text in shown


def test_pairs_are_shown_by_the_better_answer(check):
    pair = {"prompt": "When is payday?", "chosen": "On the 1st.", "rejected": "Never."}
    code, shown = check([pair, {**pair, "rejected": "On the 1st."}], pairs=True)
    assert code == 0
    assert "1 │ used" in shown
    assert "「On the 1st.<|im_end|>」" in shown
    assert "Packing, at 8 pairs a step:" in shown
    assert shown.rstrip().endswith("objective.name=dpo")
    with pytest.raises(DataError, match="lorasmith check --pairs looks at them"):
        check([pair])


def test_of_a_conversation_in_pairs_the_last_answer_alone_is_shown_as_learnt(check):
    asked = [
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "The handbook."},
        {"role": "user", "content": "When is payday?"},
    ]
    last = ({"role": "assistant", "content": text} for text in ("On the 1st.", "Never."))
    chosen, rejected = ([*asked, answer] for answer in last)
    code, shown = check([{"chosen": chosen, "rejected": rejected}], pairs=True)
    assert code == 0
    assert "「On the 1st.<|im_end|>」" in shown
    assert "「The handbook." not in shown


def test_wrong_rows_are_all_listed_and_the_code_is_2(check):
    code, shown = check([GOOD[0], "{", '{"instruction": NaN}', {"messages": []}])
    assert code == 2
    assert "rows.jsonl:2: not JSON: " in shown
    assert "rows.jsonl:3: NaN or Infinity: " in shown
    assert "rows.jsonl:4: another schema: a row of OpenAI messages, in a file of Alpaca rows" in shown
    assert "Wrong rows: 3. Training would stop before its first step." in shown
    assert "Ready to train" not in shown
    code, shown = check([GOOD[0], "{", '{"instruction": NaN}', {"messages": []}], on_bad_row="skip")
    assert code == 0
    assert "data.on_bad_row=skip" in shown


@pytest.mark.parametrize(
    ("policy", "code", "text"),
    [
        ("error", 2, "Longer than max_seq_len 40: 1. Choose: --overlong drop"),
        ("drop", 0, "Longer than max_seq_len 40, left out by --overlong drop: 1."),
        ("truncate", 0, "Longer than max_seq_len 40, cut by --overlong truncate, the end token kept: 1."),
    ],
)
def test_what_will_be_cut_is_said(check, policy, code, text):
    rows = [GOOD[0], {"instruction": "Say it.", "output": "word " * 60}]
    found, shown = check(rows, overlong=policy, max_seq_len=40)
    assert (found, text in shown) == (code, True)


def test_machines_get_one_json_object(check):
    code, shown = check([*GOOD, "{"], as_json=True)
    report = json.loads(shown)
    assert code == 2
    assert report["receipt"]["rows_read"] == 6
    assert report["receipt"]["failed"] == {"not JSON": 1}
    assert sum(b["count"] for b in report["tokens"]["prompt"]["bins"]) == 3
    spans = report["first_example"]["spans"]
    assert [s["text"] for s in spans if s["is_learnt"]] == ["On the 1st.<|im_end|>"]
    assert report["longest"][0]["where"] == "rows.jsonl:2"
    assert 0 < report["packing"]["shared_tokens"] <= report["packing"]["padded_tokens"]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_file_without_a_usable_row_has_code_2(check, as_json):
    code, shown = check(["", " "], as_json=as_json)
    assert code == 2
    assert ("No row can be used" in shown) != as_json
    assert "Nothing will be cut" not in shown
    _, shown = check([], as_json=as_json, labels=True)
    assert "0 answers are good" not in shown


def test_the_recipe_and_the_format_can_be_named(check):
    code, shown = check(
        [{"prompt": "a", "completion": "b", "messages": 1}], format="prompt_completion", recipe="alpaca"
    )
    assert code == 0
    assert "### Instruction:" in shown
    assert "data.format=prompt_completion prompt.recipe=alpaca" in shown


def test_a_missing_file_is_an_error(tiny_base_folder):
    with pytest.raises(DataError, match="does not exist"):
        command("nowhere.jsonl", model=str(tiny_base_folder))
