"""The receipt adds up, whatever the rows are."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.data.dataset import examine_dataset
from lorasmith.data.prompts import choose_recipe
from lorasmith.data.receipt import Ledger, Receipt
from lorasmith.data.settings import DataSettings, PromptSettings


def test_a_receipt_that_does_not_add_up_is_refused():
    with pytest.raises(ValueError, match="does not add up: 3 of 4 rows"):
        Receipt("r.jsonl", rows_read=4, used=1, skipped={"blank line": 2})


def test_a_receipt_survives_json():
    ledger = Ledger("r", ["b.jsonl", "a.jsonl"], skips_faults=False)
    for _ in range(5):
        ledger.read()
    ledger.use()
    ledger.use()
    ledger.fail("not JSON", "a.jsonl:1", "column 3")
    ledger.fail("not JSON", "b.jsonl:10")
    ledger.skip("blank line", "b.jsonl:2")
    ledger.refuse("too long", "b.jsonl:9", "700 tokens", was_used=True)
    ledger.read()
    ledger.use()
    ledger.warn("odd", "b.jsonl:1: odd")
    receipt = ledger.close()
    assert (receipt.rows_read, receipt.used, receipt.skipped) == (6, 2, {"blank line": 1})
    assert receipt.failed == {"not JSON": 2, "too long": 1}
    assert receipt.faults == (  # in the order of the files, then of the lines
        ("b.jsonl:9", "too long: 700 tokens"),
        ("b.jsonl:10", "not JSON"),
        ("a.jsonl:1", "not JSON: column 3"),
    )
    assert Receipt.from_json(json.loads(json.dumps(receipt.to_json()))) == receipt


def test_skipped_faults_are_counted_as_skips():
    ledger = Ledger("r", ["a.jsonl"], skips_faults=True)
    ledger.read()
    ledger.fail("not JSON", "a.jsonl:1")
    ledger.read()
    ledger.refuse("too long", "a.jsonl:2")  # has a policy of its own
    receipt = ledger.close()
    assert (receipt.skipped, receipt.failed) == ({"not JSON": 1}, {"too long": 1})


VALUES = st.one_of(st.sampled_from(["Q", "A", "", " ", "x\x00", "word " * 60]), st.none(), st.integers(0, 2))
LINES = st.one_of(
    st.fixed_dictionaries({}, optional={"instruction": VALUES, "input": VALUES, "output": VALUES}).map(
        json.dumps
    ),
    st.sampled_from(
        [
            "",
            " \r",
            "{",
            "[]",
            '{"output": NaN}',
            "{} {}",
            '{"messages": []}',
            '"\ud800"',
            '{"output": "\\ud800"}',
        ]
    ),
)


@given(
    st.lists(LINES, max_size=12),
    st.sampled_from(["error", "skip"]),
    st.sampled_from(["error", "drop", "truncate"]),
)
@settings(max_examples=80, deadline=None)
def test_used_skipped_and_failed_are_all_rows(tiny_tokenizer, tmp_path_factory, lines, on_bad_row, overlong):
    path = tmp_path_factory.mktemp("rows") / "r.jsonl"
    lines = ['{"instruction": "first", "output": "row"}', *lines]
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    num_lines = path.read_bytes().count(b"\n") + (not path.read_bytes().endswith(b"\n"))
    data = DataSettings(
        train=str(path),
        max_seq_len=48,
        on_bad_row=on_bad_row,
        overlong=overlong,
        cache_dir=str(path.parent / "cache"),
    )
    recipe, _ = choose_recipe(PromptSettings(), tiny_tokenizer)
    dataset = examine_dataset(data, recipe, tiny_tokenizer)
    receipt = dataset.receipt
    assert receipt.rows_read == num_lines
    assert receipt.used + sum(receipt.skipped.values()) + sum(receipt.failed.values()) == num_lines
    assert len(dataset) == receipt.used
    assert len(receipt.faults) == receipt.num_failed
    assert len(receipt.skips) == receipt.num_skipped
    wheres = [where for where, _ in (*receipt.faults, *receipt.skips)] + [e.where for e in dataset]
    assert sorted(wheres) == sorted(f"r.jsonl:{line}" for line in range(1, num_lines + 1))
    assert set(receipt.failed) <= {"too long"} or on_bad_row == "error"
