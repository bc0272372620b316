"""Finding the data: files, folders, wrong paths, Hub ids without a network."""

import sys

import pytest

from lorasmith.data.sources import open_source, read_rows
from lorasmith.errors import DataError, MissingExtraError


def test_a_folder_gives_its_data_files_in_order(tmp_path):
    for name in ("b.jsonl", "a/z.jsonl", ".hidden/c.jsonl", "README.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"x": 1}\n')
    assert [row.where for row in read_rows(tmp_path)] == ["a/z.jsonl:1", "b.jsonl:1"]


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no data file \(\.json, \.jsonl, \.csv, \.parquet\)"):
        open_source(tmp_path)


def test_a_wrong_path_names_the_nearest_files(tmp_path):
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(DataError, match=r"does not exist\. Did you mean .*train\.jsonl\?"):
        open_source(tmp_path / "tain.jsonl")
    with pytest.raises(DataError, match=r"Data files in .*: train\.jsonl\."):
        open_source(tmp_path / "questions.csv")
    with pytest.raises(DataError, match=r"The folder .*nowhere does not exist either"):
        open_source(tmp_path / "nowhere" / "x.json")


def test_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "notes.pdf").touch()
    with pytest.raises(DataError, match=r"is a \.pdf; lorasmith reads \.json, \.jsonl, \.csv, \.parquet, a"):
        open_source(tmp_path / "notes.pdf")
    with pytest.raises(DataError, match=r"reads \.json, .*\.txt, \.md, a folder"):
        open_source(tmp_path / "notes.pdf", kind="documents")


@pytest.mark.parametrize("path", ["notes.md", "./data", "a/b/c", "../x", "C:\\data"])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        open_source(path)


def test_a_hub_id_without_network_says_what_to_do(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(
        DataError, match=r"'someone/nothing' is no file or folder here.*give its path.*network"
    ):
        open_source("someone/nothing")


def test_a_hub_id_without_the_package_gives_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lorasmith\[hub-data\]'"):
        open_source("someone/nothing")


def test_a_hub_split_is_read_by_row(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"instruction": str(i), "output": "x"} for i in range(3)]
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(tmp_path / "saved")
    loaded = datasets.load_from_disk(tmp_path / "saved")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: loaded)
    source = open_source("someone/something", split="test")
    assert [row.where for row in read_rows("someone/something")] == [
        f"someone/something:{i}" for i in (1, 2, 3)
    ]
    assert source.fingerprint() == open_source("someone/something").fingerprint()


def test_the_fingerprint_is_of_the_content(tmp_path):
    for folder, content in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "r.jsonl").write_text(content)
    prints = [open_source(tmp_path / folder / "r.jsonl").fingerprint() for folder in "abc"]
    assert prints[0] == prints[1] != prints[2]


def test_a_json_file_that_is_one_object_is_told_once(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text('{\n  "data": [\n    {"instruction": "a", "output": "b"}\n  ]\n}\n')
    (fault,) = list(read_rows(file))
    assert (fault.reason, fault.where) == ("not a list of rows", "rows.json:1")
    file.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": "d"}\n')
    assert [row.where for row in read_rows(file)] == ["rows.json:1", "rows.json:2"]
