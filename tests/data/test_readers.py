"""Readers: every row with its line, every fault named, one bad row never hides the next."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorasmith.data import readers
from lorasmith.data.readers import READERS, BlankLine, Position, Row, RowFault, split_place
from lorasmith.data.sources import read_rows
from lorasmith.errors import DataError


def read(folder, name, content):
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_rows(path))


def summary(items):
    """(line, what) of each item: a row's first value, a fault's reason, or blank; -n for "row n"."""
    found = []
    for item in items:
        _, line = split_place(item.where)
        match item:
            case Row(fields, _):
                found.append((line, next(iter(fields.values()))))
            case RowFault(reason, _, _):
                found.append((line, reason))
            case BlankLine(_):
                found.append((line, "blank"))
    return found


def test_jsonl_names_every_line(tmp_path):
    content = b"\n".join(
        [
            b'\xef\xbb\xbf{"a": 1}\r',
            b"  \r",
            b'{"a": 2',
            b'{"a": NaN}',
            b'{"a": [-Infinity]}',
            b'{"a": 1} {"a": 2}',
            b'{"a": 1} x',
            b'{"a": "\xff"}',
            b'{"a": "tab\there"}',
            b"[1]",
            b"null",
            '{"a": "line\u2028end\u0085"}'.encode(),
            b'{"a": 3}',
        ]
    )
    items = read(tmp_path, "r.jsonl", content)
    assert summary(items) == [
        (1, 1),
        (2, "blank"),
        (3, "not JSON"),
        (4, "NaN or Infinity"),
        (5, "NaN or Infinity"),
        (6, "two objects on a line"),
        (7, "not JSON"),
        (8, "not UTF-8"),
        (9, "control character"),
        (10, "not an object"),
        (11, "not an object"),
        (12, "line\u2028end\u0085"),
        (13, 3),
    ]
    assert items[0].where == "r.jsonl:1"
    assert items[7].detail == "byte 0xff at column 8"


def test_a_json_list_names_every_line(tmp_path):
    content = '\ufeff[\r\n{"a": 1},\n\n  {"a":\n 2},  {"a": NaN}, {"a": 4}\n,{"a": 5}, 6\n]\n'
    items = read(tmp_path, "r.json", content)
    assert summary(items) == [(2, 1), (4, 2), (5, "NaN or Infinity"), (5, 4), (6, 5), (6, "not an object")]


def test_rows_of_a_list_on_one_line_are_told_apart_by_number(tmp_path):
    items = read(tmp_path, "a row 3.json", '[{"a": 1}, {"a": oops}, {"a": 3}]')
    assert [item.where for item in items] == [f"a row 3.json row {number}" for number in (1, 2, 3)]
    assert [split_place(item.where) for item in items] == [("a row 3.json", -n) for n in (1, 2, 3)]
    assert [item.where for item in read(tmp_path, "a row 3.json", '[\n{"a": 1}]')] == ["a row 3.json:2"]


def test_a_bad_row_in_a_json_list_does_not_hide_the_next(tmp_path):
    content = '[\n{"a": 1},\n{"a": oops},\n{"a": 3}\n{"a": 4},\n{"a": "b\nc"},\n{"a": 6},\n]'
    assert summary(read(tmp_path, "r.json", content)) == [
        (2, 1),
        (3, "not JSON"),
        (4, 3),
        (5, "not JSON"),  # the comma before it is missing
        (6, "control character"),
        (8, 6),
        (9, "not JSON"),  # a comma, and no row after it
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", []),
        ("[]", []),
        ("[", [(1, "not JSON")]),
        ('[{"a": 1}', [(-1, 1), (-2, "not JSON")]),
        ('[{"a": 1}]\n]', [(1, 1), (2, "not JSON")]),
        ('"text"', [(1, "not JSON")]),
        ('{"a": 1}\n{"a": 2}\n', [(1, 1), (2, 2)]),  # JSON lines with the ending .json
    ],
)
def test_odd_json_files(tmp_path, content, expected):
    assert summary(read(tmp_path, "r.json", content)) == expected


@pytest.mark.parametrize("block_bytes", [1, 7, 1000])
def test_a_bad_row_is_left_behind_as_a_whole(tmp_path, monkeypatch, block_bytes):
    monkeypatch.setattr(readers, "_BLOCK_BYTES", block_bytes)
    content = '[{"m": [{"a": 1}, {"b": NaN}], oops},\n{"a": NaN, "b": [{}, {}]}, {"a": 3}]'
    assert summary(read(tmp_path, "r.json", content)) == [(1, "not JSON"), (2, "NaN or Infinity"), (2, 3)]


def test_a_bad_row_of_many_blocks_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_BLOCK_BYTES", 50)
    monkeypatch.setattr(readers, "_MAX_ROW_CHARS", 100)
    content = '[{"a": 1},\n{"a": "' + "x" * 20_000 + '\n"},\n{"a": 3}]'
    assert summary(read(tmp_path, "r.json", content)) == [(1, 1), (2, "not JSON"), (4, 3)]


def test_bytes_that_are_not_utf8_spoil_their_row_only(tmp_path):
    content = b'[{"a": "\xc3\xa9"}, {"a": "\xff"}, {"a": "\\udcff"}, {"a": 4}]'
    assert summary(read(tmp_path, "r.json", content)) == [
        (-1, "é"),
        (-2, "not UTF-8"),
        (-3, "\udcff"),
        (-4, 4),
    ]


ROWS = st.lists(
    st.dictionaries(
        st.text(max_size=5), st.one_of(st.text(max_size=40), st.integers(), st.none()), max_size=3
    ),
    max_size=12,
)


@given(ROWS, st.sampled_from([None, 1]), st.integers(1, 64))
@settings(max_examples=80, deadline=None)
def test_a_json_list_reads_the_same_in_blocks_of_any_size(tmp_path_factory, rows, indent, block_bytes):
    path = tmp_path_factory.mktemp("blocks") / "r.json"
    whole = json.dumps(rows, indent=indent, ensure_ascii=bool(indent))
    path.write_bytes(whole.encode())
    position = Position()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_BLOCK_BYTES", block_bytes)
        items = list(READERS[".json"](path, "r.json", position))
    assert [item.fields for item in items if isinstance(item, Row)] == rows
    assert position.done == path.stat().st_size
    for count, item in enumerate(items, start=1):
        _, number = split_place(item.where)
        assert number == -count or "{" in whole.split("\n")[number - 1]


def test_csv_names_the_line_where_a_row_starts(tmp_path):
    content = (
        b'\xef\xbb\xbfinstruction,output\r\n"a, b",1\r\n\r\n"two\nlines","say ""x"""\r\nd,4,5\r\ne\r\nf,\xff\r\n'
        b'"g"h,7\ni,8\n'
    )
    items = read(tmp_path, "r.csv", content)
    assert summary(items) == [
        (2, "a, b"),
        (3, "blank"),
        (4, "two\nlines"),
        (6, "not CSV"),
        (7, "e"),
        (8, "not UTF-8"),
        (9, "not CSV"),
        (10, "i"),
    ]
    assert items[2].fields == {"instruction": "two\nlines", "output": 'say "x"'}
    assert items[4].fields == {"instruction": "e"}


def test_parquet_counts_rows(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [{"role": "user", "content": str(i)}]} for i in range(2500)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "r.parquet")
    items = list(read_rows(tmp_path / "r.parquet"))
    assert [item.fields for item in items] == rows
    assert items[2499].where == "r.parquet:2500"


def test_a_file_that_is_not_parquet_is_named(tmp_path):
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=r"r\.parquet is not a Parquet file"):
        read(tmp_path, "r.parquet", "instruction,output\n")
