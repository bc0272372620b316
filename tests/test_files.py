"""Files and folders appear whole or not at all."""

import pytest

from lorasmith.files import recover_folder, whole_folder, write_whole


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    file = tmp_path / "a.json"
    for text in ("old", "new é"):
        write_whole(file, text)
    assert file.read_text("utf-8") == "new é"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    write_whole(tmp_path / "a.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "a.json", "\ud800")
    assert (tmp_path / "a.json").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def fill(folder, text):
    with whole_folder(folder) as part:
        (part / "f").write_text(text)
        assert not folder.exists() or (folder / "f").read_text() != text


def test_a_folder_appears_at_the_end_and_replaces_the_old(tmp_path):
    for text in ("old", "new"):
        fill(tmp_path / "deep" / "x", text)
    assert (tmp_path / "deep" / "x" / "f").read_text() == "new"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["x"]


def fail_to_fill(folder, fault):
    with whole_folder(folder) as part:
        (part / "f").write_text("half")
        raise fault


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
def test_a_failure_keeps_the_old_folder(tmp_path, fault):
    fill(tmp_path / "x", "old")
    with pytest.raises(fault):
        fail_to_fill(tmp_path / "x", fault)
    assert (tmp_path / "x" / "f").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_crash_between_the_two_renames_is_mended(tmp_path):
    fill(tmp_path / "x", "old")
    (tmp_path / "x").rename(tmp_path / ".x.previous")
    recover_folder(tmp_path / "x")
    assert (tmp_path / "x" / "f").read_text() == "old"


def test_a_crash_after_the_renames_leaves_the_new_one(tmp_path):
    fill(tmp_path / ".x.previous", "old")
    fill(tmp_path / "x", "new")
    recover_folder(tmp_path / "x")
    assert (tmp_path / "x" / "f").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
