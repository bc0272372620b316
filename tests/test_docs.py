"""The page of Python runs as it stands."""

import re
from pathlib import Path

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
