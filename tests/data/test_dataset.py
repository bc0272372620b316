"""From a file to tokens: policies, the cache, crashes, workers."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from lorasmith.data import dataset as dataset_module
from lorasmith.data import workers
from lorasmith.data.dataset import prepare_dataset
from lorasmith.data.example import Example, Message
from lorasmith.data.prompts import choose_recipe
from lorasmith.data.settings import DataSettings, PromptSettings
from lorasmith.data.tokens import IGNORE_INDEX, encode
from lorasmith.errors import DataError, OverlongError


@pytest.fixture
def recipe(tiny_tokenizer):
    return choose_recipe(PromptSettings(), tiny_tokenizer)[0]


def row(question, answer, **more):
    return {"instruction": question, "output": answer, **more}


@pytest.fixture
def write(tmp_path):
    def write(rows, name="train.jsonl"):
        lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return str(tmp_path / name)

    return write


def many(count):
    return [row(f"Question {i}?", f"Answer {i} {'word ' * (i % 7)}") for i in range(count)]


def as_lists(dataset):
    return [(e.where, e.input_ids.tolist(), e.labels.tolist()) for e in dataset]


def test_a_dataset_holds_every_example_with_its_labels(write, recipe, tiny_tokenizer):
    path = write([row("One?", "1"), row("Two?", "2", input="two")])
    dataset = prepare_dataset(DataSettings(train=path), recipe, tiny_tokenizer)
    talk = Example((Message("user", "Two?", "two"), Message("assistant", "2")), "")
    ids, is_learnt = encode(recipe.render(talk), tiny_tokenizer)
    example = dataset[1]
    assert example.where == dataset.where(1) == "train.jsonl:2"
    assert (example.input_ids.dtype, example.labels.dtype) == (np.int32, np.int32)
    assert example.input_ids.tolist() == ids.tolist()
    assert example.labels.tolist() == np.where(is_learnt, ids, IGNORE_INDEX).tolist()
    assert dataset.lengths.tolist() == [len(dataset[0].input_ids), len(ids)]
    assert dataset.num_learnt.tolist() == [2, is_learnt.sum()]
    assert (dataset.receipt.used, dataset.receipt.rows_read) == (2, 2)


def test_rows_of_a_file_of_one_line_are_named_by_number(write, recipe, tiny_tokenizer):
    rows = [row("One?", "1"), row("One?", "1"), row("Two?", ""), row("Three?", "3 " * 40)]
    data = DataSettings(train=write([json.dumps(rows)], "r.json"), max_seq_len=60, overlong="drop")
    dataset = prepare_dataset(data, recipe, tiny_tokenizer)
    assert [example.where for example in dataset] == ["r.json row 1"]
    wheres, reasons = zip(*dataset.receipt.skips, strict=True)
    assert wheres == ("r.json row 2", "r.json row 3", "r.json row 4")
    assert reasons[0] == "duplicate: the same as r.json row 1"


def test_slices_and_subsets_share_the_tokens(write, recipe, tiny_tokenizer):
    dataset = prepare_dataset(DataSettings(train=write(many(10))), recipe, tiny_tokenizer)
    whole = as_lists(dataset)
    assert as_lists(dataset[2:5]) == whole[2:5]
    assert as_lists(dataset.subset([7, 0, -1])) == [whole[7], whole[0], whole[9]]
    assert dataset.subset([7]).lengths.tolist() == [dataset.lengths[7]]
    assert as_lists(dataset[2:5][::-1]) == whole[2:5][::-1]
    with pytest.raises(IndexError):
        dataset[10]


def test_duplicates_are_skipped_and_conflicts_warned_of(write, recipe, tiny_tokenizer):
    rows = [
        row("One?", "1"),
        json.dumps(row("One?", "1", input=None, id=7)).replace(
            "O", "\\u004f"
        ),  # other bytes, the same fields
        row("One?", "one"),
        row("One?", "1", input="other"),
    ]
    receipt = prepare_dataset(DataSettings(train=write(rows)), recipe, tiny_tokenizer).receipt
    assert (receipt.used, receipt.skipped) == (3, {"duplicate": 1})
    assert receipt.skips == (("train.jsonl:2", "duplicate: the same as train.jsonl:1"),)
    assert receipt.warnings == ("train.jsonl:3: same question as train.jsonl:1, other answer",)


def test_all_errors_are_listed_before_anything_else(write, recipe, tiny_tokenizer):
    path = write([row("One?", "1"), "{", row("long " * 300, "x"), '{"instruction": NaN}', {"messages": []}])
    data = DataSettings(train=path)
    with pytest.raises(DataError) as caught:
        prepare_dataset(data, recipe, tiny_tokenizer)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}: 4 of 5 rows are wrong; nothing was trained."
    assert [line.split(":")[1] for line in lines[1:5]] == ["2", "3", "4", "5"]
    assert "--on-bad-row skip" in lines[5]
    assert "--overlong drop" in lines[6]
    skipping = data.model_copy(update={"on_bad_row": "skip", "overlong": "drop"})
    receipt = prepare_dataset(skipping, recipe, tiny_tokenizer).receipt
    assert (receipt.used, receipt.num_skipped, receipt.num_failed) == (1, 4, 0)


def test_rows_that_the_template_refuses_are_errors(write, recipe, tiny_tokenizer):
    strict = replace(
        recipe,
        template="{% if messages[0].content == 'no' %}{{ raise_exception('Not this') }}{% endif %}"
        + recipe.template,
    )
    path = write([row("yes", "1"), row("no", "2"), row("maybe", "3")])
    with pytest.raises(DataError, match=r"train\.jsonl:2: recipe: .*Not this"):
        prepare_dataset(DataSettings(train=path), strict, tiny_tokenizer)
    kept = prepare_dataset(DataSettings(train=path, on_bad_row="skip"), strict, tiny_tokenizer)
    assert [e.where for e in kept] == ["train.jsonl:1", "train.jsonl:3"]
    whole = prepare_dataset(DataSettings(train=path), recipe, tiny_tokenizer)
    assert kept[1].input_ids.tolist() == whole[2].input_ids.tolist()


def test_overlong_examples_are_an_error_that_names_both_ways_out(write, recipe, tiny_tokenizer):
    path = write([row("One?", "1"), row("Two?", "word " * 50)])
    with pytest.raises(
        OverlongError, match=r"train\.jsonl:2: too long: \d+ tokens, max_seq_len is 40"
    ) as caught:
        prepare_dataset(DataSettings(train=path, max_seq_len=40, on_bad_row="skip"), recipe, tiny_tokenizer)
    assert "--overlong drop" in str(caught.value)
    assert "--overlong truncate" in str(caught.value)
    assert "--on-bad-row" not in str(caught.value)  # would not help


def test_overlong_examples_are_dropped_or_cut(write, recipe, tiny_tokenizer):
    path = write([row("One?", "1"), row("Two?", "word " * 50), row("word " * 50, "3")])
    settings = DataSettings(train=path, max_seq_len=40, overlong="drop")
    dropped = prepare_dataset(settings, recipe, tiny_tokenizer)
    assert (len(dropped), dropped.receipt.skipped) == (1, {"too long": 2})
    cut = prepare_dataset(settings.model_copy(update={"overlong": "truncate"}), recipe, tiny_tokenizer)
    assert (len(cut), cut.receipt.truncated) == (2, 1)
    assert cut.receipt.skipped == {"no room for an answer": 1}
    end = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert len(cut[1].input_ids) == cut.lengths[1] == 40
    assert (cut[1].input_ids[-1], cut[1].labels[-1]) == (end, end)
    assert cut.num_learnt[1] == (cut[1].labels != IGNORE_INDEX).sum()
    assert cut.uncut_lengths[1] > 40


def test_a_source_without_a_usable_row_is_refused(write, recipe, tiny_tokenizer):
    with pytest.raises(DataError, match=r"no row can be used \(1 missing answer\)"):
        prepare_dataset(
            DataSettings(train=write([{"instruction": "Q"}]), format="alpaca"), recipe, tiny_tokenizer
        )
    with pytest.raises(DataError, match=r"no row can be used \(1 blank line\)"):
        prepare_dataset(DataSettings(train=write([""])), recipe, tiny_tokenizer)


def test_rows_of_no_known_format_name_the_nearest(write, recipe, tiny_tokenizer):
    with pytest.raises(
        DataError, match=r"train\.jsonl:1: .*keys found: instruction, response.*nearest format is Alpaca"
    ):
        prepare_dataset(
            DataSettings(train=write([{"instruction": "a", "response": "b"}])), recipe, tiny_tokenizer
        )


def test_each_file_of_a_folder_has_its_own_format(write, recipe, tiny_tokenizer, tmp_path):
    write([row("One?", "1")], "a.jsonl")
    write(
        ['{"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "2"}]}'], "b.jsonl"
    )
    (tmp_path / "c.csv").write_text("prompt,completion\nThree?,3\n")
    dataset = prepare_dataset(DataSettings(train=str(tmp_path)), recipe, tiny_tokenizer)
    assert [e.where for e in dataset] == ["a.jsonl:1", "b.jsonl:1", "c.csv:2"]
    assert dataset.receipt.warnings == ("b.jsonl:1: same question as a.jsonl:1, other answer",)


def test_progress_is_of_all_files_together(write, recipe, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_module, "SHARD_ROWS", 5)
    write(many(10), "a.jsonl")
    write([row("Other?", "1")], "b.jsonl")
    shares = []
    data = DataSettings(train=str(tmp_path))
    prepare_dataset(data, recipe, tiny_tokenizer, progress=lambda rows, share: shares.append(share))
    assert shares == sorted(shares)
    assert 0.4 < shares[0] < 0.6
    assert shares[-1] == 1.0


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(dataset_module, "SHARD_ROWS", 10)
    monkeypatch.setattr(dataset_module, "ROWS_FOR_WORKERS", 20)


@pytest.fixture
def written(monkeypatch):
    """The keys of all shards that are written in this process."""
    keys = []
    write_shard = workers.write_shard

    def write(folder, key, *rest):
        keys.append(key)
        write_shard(folder, key, *rest)

    monkeypatch.setattr(workers, "write_shard", write)
    return keys


def test_a_second_start_reads_no_row(write, recipe, tiny_tokenizer, monkeypatch, written):
    data = DataSettings(train=write([*many(5), {"instruction": "no answer"}]))
    first = prepare_dataset(data, recipe, tiny_tokenizer)
    monkeypatch.setattr(dataset_module, "read_examples", None)  # calling it would fail
    second = prepare_dataset(data, recipe, tiny_tokenizer)
    assert as_lists(second) == as_lists(first)
    assert second.receipt == first.receipt
    assert second.fingerprint == first.fingerprint
    assert len(written) == 1


@pytest.mark.parametrize("change", ["data", "recipe", "policy"])
def test_the_cache_is_never_out_of_date(write, recipe, tiny_tokenizer, written, change):
    data = DataSettings(train=write(many(5)))
    before = prepare_dataset(data, recipe, tiny_tokenizer)
    if change == "data":
        write([*many(4), row("Question 4?", "changed")])
    elif change == "recipe":
        recipe = replace(recipe, system="Be brief.")
    else:
        data = data.model_copy(update={"max_seq_len": int(before.lengths.max()) - 1, "overlong": "drop"})
    after = prepare_dataset(data, recipe, tiny_tokenizer)
    assert as_lists(after) != as_lists(before)
    assert len(written) == (1 if change == "policy" else 2)  # a policy does not change tokens


def test_a_crash_loses_no_finished_shard(write, recipe, tiny_tokenizer, small_shards, monkeypatch, written):
    monkeypatch.setattr(dataset_module, "ROWS_FOR_WORKERS", 1000)
    data = DataSettings(train=write(many(55)))

    def crash(rows, share):
        if rows >= 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_dataset(data, recipe, tiny_tokenizer, progress=crash)
    assert len(written) == 3
    reports = []
    dataset = prepare_dataset(data, recipe, tiny_tokenizer, progress=lambda *report: reports.append(report))
    assert len(written) == len(set(written)) == 6
    assert [e.where for e in dataset] == [f"train.jsonl:{i}" for i in range(1, 56)]
    assert reports[-1] == (55, 1.0)
    fresh = prepare_dataset(data.model_copy(update={"cache_dir": data.train + "-2"}), recipe, tiny_tokenizer)
    assert as_lists(fresh) == as_lists(dataset)


def test_a_half_written_shard_is_written_again(write, recipe, tiny_tokenizer, tmp_path, written):
    data = DataSettings(train=write(many(5)), cache_dir=str(tmp_path / "cache"))
    whole = as_lists(prepare_dataset(data, recipe, tiny_tokenizer))
    (rows,) = (tmp_path / "cache" / "data" / "shards").rglob("*.rows")
    rows.unlink()  # as if the machine had stopped between the two files
    assert as_lists(prepare_dataset(data, recipe, tiny_tokenizer)) == whole
    assert len(written) == 2


@pytest.mark.parametrize("kind", ["shards/**/*.npy", "shards/**/*.rows", "index/*.rows"])
@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "remove"])
def test_a_damaged_cache_is_made_again(write, recipe, tiny_tokenizer, tmp_path, kind, harm):
    data = DataSettings(train=write(many(5)), cache_dir=str(tmp_path / "cache"))
    whole = as_lists(prepare_dataset(data, recipe, tiny_tokenizer))
    (file,) = (tmp_path / "cache" / "data").glob(kind)
    content = file.read_bytes()
    if harm == "flip":
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif harm == "remove":
        file.unlink()
    else:
        file.write_bytes(content[: len(content) // 2] if harm == "cut" else b"")
    assert as_lists(prepare_dataset(data, recipe, tiny_tokenizer)) == whole
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("name", "text"), [("a.json", "[]"), ("a.jsonl", ""), ("a.csv", "prompt,completion\n")]
)
def test_an_empty_file_is_told_as_empty(tmp_path, recipe, tiny_tokenizer, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=rf"{name} is empty: there is no row in it"):
        prepare_dataset(DataSettings(train=str(tmp_path / name)), recipe, tiny_tokenizer)


def test_worker_processes_give_the_same(write, recipe, tiny_tokenizer, small_shards, monkeypatch, written):
    refusing = replace(
        recipe,
        template="{% if 'tion 33?' in messages[0].content %}{{ raise_exception('no') }}{% endif %}"
        + recipe.template,
    )
    data = DataSettings(train=write([*many(75), "{"]), max_seq_len=60, overlong="truncate", on_bad_row="skip")
    reports = []
    parallel = prepare_dataset(
        data, refusing, tiny_tokenizer, progress=lambda *report: reports.append(report)
    )
    assert not written  # in this process
    assert [rows for rows, _ in reports] == [10, 20, 30, 40, 50, 60, 70, 75]
    monkeypatch.setattr(dataset_module, "ROWS_FOR_WORKERS", 1000)
    here = prepare_dataset(data.model_copy(update={"cache_dir": data.train + "-2"}), refusing, tiny_tokenizer)
    assert len(written) == 8
    assert as_lists(parallel) == as_lists(here)
    assert parallel.receipt == here.receipt
    assert here.receipt.skipped == {"not JSON": 1, "recipe": 1}


def test_a_worker_needs_no_torch():
    code = "import lorasmith.data.workers, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_a_killed_worker_is_told(write, recipe, tiny_tokenizer, small_shards, monkeypatch):
    monkeypatch.setattr(workers.sys, "executable", "false")  # a program that ends at once
    with pytest.raises(DataError, match="A tokenising process ended with exit code"):
        prepare_dataset(DataSettings(train=write(many(75))), recipe, tiny_tokenizer)


def test_a_cache_folder_that_is_a_file_is_told(write, recipe, tiny_tokenizer):
    path = write(many(2))
    with pytest.raises(DataError, match=r"cannot be written.*LORASMITH_CACHE"):
        prepare_dataset(DataSettings(train=path, cache_dir=path), recipe, tiny_tokenizer)
