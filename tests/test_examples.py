"""Every run file in examples/ trains, on a tiny base and for two steps; the README's Python runs too."""

import re
from pathlib import Path

import pytest

import lorasmith

ROOT = Path(__file__).resolve().parents[1]
RUN_FILES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.mark.parametrize("file", RUN_FILES, ids=lambda file: file.name)
def test_the_run_file_trains(file, tiny_base_folder, tmp_path):
    overrides = [
        f"base.model={tiny_base_folder}",
        "data.max_seq_len=1024",
        "training.max_steps=2",
        "run.trackers=[]",
    ]
    settings = lorasmith.load_run_file(file, overrides, {})
    reports = list(lorasmith.train(settings, tmp_path / "run"))
    assert [report.step for report in reports] == [1, 2]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_there_are_examples():
    assert {file.name for file in RUN_FILES} >= {"handbook.yaml", "alpaca-2023.yaml", "chat.yaml"}


def test_the_alpaca_recipe_of_2023_is_expressed_setting_by_setting():
    settings = lorasmith.load_run_file(ROOT / "examples" / "alpaca-2023.yaml", (), {})
    training, method = settings.training, settings.method
    assert (training.micro_batch_size, training.batch_size, training.epochs) == (4, 128, 2)
    assert (training.learning_rate, training.warmup_steps) == (2e-5, 100)
    assert (method.r, method.lora_alpha, method.lora_dropout) == (4, 16, 0.05)
    assert (settings.data.max_seq_len, settings.prompt.recipe) == (256, "alpaca")
    assert settings.engine.gradient_checkpointing
    assert lorasmith.load_run_file(None, ["data.train=x", "base.dtype=float16"], {}).base.dtype == "float16"


def test_the_python_of_the_readme_runs(tiny_base_folder, tmp_path, monkeypatch, capsys):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORASMITH_BASE__MODEL", str(tiny_base_folder))
    monkeypatch.setenv("LORASMITH_DATA__MAX_SEQ_LEN", "1024")
    monkeypatch.setenv("LORASMITH_TRAINING__MAX_STEPS", "3")
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "runs" / "handbook" / "adapter").is_dir()
    assert (tmp_path / "merged" / "handbook" / "model.safetensors").is_file()
    assert capsys.readouterr().out.strip()


def test_public_names_are_few_sorted_and_there():
    assert lorasmith.__all__ == sorted(lorasmith.__all__)
    assert len(lorasmith.__all__) <= 12
    for name in lorasmith.__all__:
        assert getattr(lorasmith, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        lorasmith.nonsense  # noqa: B018
