"""Which runs are compared, that they are alike in what must be alike, and what is refused."""

import pytest
import yaml

from lorasmith.cli.candidates import (
    check_budgets,
    check_held_out_is_there,
    make_candidates,
    read_methods,
    with_budget,
)
from lorasmith.cli.run_file import load_run_file, write_run_file
from lorasmith.errors import SettingsError
from lorasmith.model.method_settings import METHODS


@pytest.fixture
def files(tmp_path, monkeypatch):
    """a.yaml and b.yaml, alike but for the rank, in the working folder, with their data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faq.json").write_text('[{"instruction": "Who?", "output": "We."}]')
    for name, r in (("a", 4), ("b", 8)):
        sections = {
            "data": {"train": "faq.json"},
            "method": {"r": r, "lora_dropout": 0.1},
            "training": {"learning_rate": 0.003, "validation_share": 0.5, "epochs": 2},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(sections))
    return tmp_path


def test_other_methods_get_their_own_defaults_and_rate(files):
    lora, vera = make_candidates(["a.yaml"], ["lora", "vera"])
    assert (lora.name, lora.run_file.method.r, lora.run_file.training.learning_rate) == ("lora", 4, 0.003)
    assert (vera.name, vera.run_file.method.r, vera.run_file.training.learning_rate) == ("vera", 256, "auto")
    assert vera.run_file.training.epochs == 2


def test_the_command_line_holds_for_all_that_have_the_setting(files):
    words = ["a.yaml", "method.r=2", "training.learning_rate=1e-4", "training.epochs=5"]
    found = [c.run_file for c in make_candidates(words, ["lora", "vera", "full"])]
    assert [getattr(run_file.method, "r", None) for run_file in found] == [2, 2, None]
    assert {run_file.training.learning_rate for run_file in found} == {1e-4}
    assert {run_file.training.epochs for run_file in found} == {5}
    assert found[0].method.lora_dropout == 0.1


def test_several_files_are_named_by_file_and_method(files):
    assert [c.name for c in make_candidates(["a.yaml", "b.yaml"], [])] == ["a", "b"]
    names = [c.name for c in make_candidates(["a.yaml", "b.yaml"], ["lora", "dora"])]
    assert names == ["a-lora", "a-dora", "b-lora", "b-dora"]
    (files / "a.yaml").rename(files / "my a.yaml")
    assert [c.name for c in make_candidates(["my a.yaml", "b.yaml"], [])] == ["my-a", "b"]


def test_all_is_every_method_and_a_typo_is_told():
    assert read_methods("all") == list(METHODS)
    assert read_methods(" lora, dora,lora") == ["lora", "dora"]
    with pytest.raises(SettingsError, match=r"--methods names dorra. Did you mean dora\?"):
        read_methods("lora,dorra")
    with pytest.raises(SettingsError, match=r"names all and lora: .*Give --methods all, or a list"):
        read_methods("all,lora")
    with pytest.raises(SettingsError, match=r"names no method. The methods are lora, "):
        read_methods(",")


@pytest.mark.parametrize(
    ("words", "methods", "told"),
    [
        (["a.yaml", "method.rr=2"], ["lora", "dora"], r"method.rr is a setting of none .*\(lora, dora\)"),
        (["a.yaml", "method.r=0"], ["dora"], r"method.r is 0: "),
        (["a.yaml", "method.name=vera"], ["lora", "dora"], r"Leave method.name=vera out, or --methods"),
        (["my a.yaml", "sub/my-a.yaml"], [], r"Two run files are called my-a"),
        (["a.yaml", "sub/a.yaml"], [], r"Two run files are called a"),
        (["a.yaml", "b.yaml", "data.on_bad_row=skip"], [], None),
        (["a.yaml", "other.yaml"], [], r"a and other differ in training.seed, .*alike.*training.seed=VALUE"),
        (["a.yaml", "apart.yaml"], [], r"a and apart differ in data.max_seq_len"),
        (
            ["dpo.yaml", "kto.yaml"],
            [],
            r"dpo \(dpo\) and kto \(kto\) do not count the same as a row.*data.validation=",
        ),
        (["dpo.yaml", "kto.yaml", "training.validation_share=0", "data.validation=faq.json"], [], None),
    ],
)
def test_what_cannot_be_compared_is_refused(words, methods, told, files):
    (files / "other.yaml").write_text((files / "a.yaml").read_text() + "  seed: 3\n")
    (files / "apart.yaml").write_text(
        (files / "a.yaml").read_text().replace("  train:", "  max_seq_len: 99\n  train:")
    )
    for name in ("dpo", "kto"):
        (files / f"{name}.yaml").write_text((files / "a.yaml").read_text() + f"objective: {{name: {name}}}\n")
    if told is None:
        assert len(make_candidates(words, methods)) == 2
        return
    with pytest.raises(SettingsError, match=told):
        make_candidates(words, methods)


def test_a_budget_that_differs_is_refused_and_tokens_make_it_alike(files, tiny_base_folder):
    (files / "b.yaml").write_text((files / "b.yaml").read_text().replace("epochs: 2", "epochs: 3"))
    (files / "faq.json").write_text(
        '[{"instruction": "Who?", "output": "We."}, {"instruction": "Why?", "output": "Why not."}]'
    )
    candidates = make_candidates(["a.yaml", "b.yaml", f"base.model={tiny_base_folder}"], [])
    with pytest.raises(SettingsError, match=r"\(a: 2 epochs; b: 3 epochs\). Give all the same: --tokens N"):
        check_budgets(candidates)
    alike, epochs = with_budget(candidates, 100)
    check_budgets(alike)
    assert {c.run_file.training.epochs for c in alike} == {epochs}
    assert with_budget(candidates, 200)[1] == pytest.approx(2 * epochs, abs=1e-3)
    with pytest.raises(SettingsError, match=r"--tokens 3 is not even one step, which has about \d+ tokens"):
        with_budget(candidates, 3)


def test_nothing_held_out_is_nothing_to_compare_by(files):
    (run_file,) = (c.run_file for c in make_candidates(["a.yaml", "training.validation_share=0"], []))
    with pytest.raises(SettingsError, match=r"Nothing is held out.*report.data=FILE.*validation_share=0.2"):
        check_held_out_is_there(run_file)


def test_a_written_run_file_reads_the_same_from_anywhere(files, monkeypatch):
    (dora,) = make_candidates(["a.yaml"], ["dora"])
    (files / "deep").mkdir()
    write_run_file(files / "deep" / "dora.yaml", dora.run_file, comment="two\nlines")
    assert (files / "deep" / "dora.yaml").read_text().startswith("# two\n# lines\n")
    monkeypatch.chdir(files / "deep")
    again = load_run_file("dora.yaml", (), {})
    assert again.data.train == str(files / "faq.json")
    assert again.method == dora.run_file.method
    assert again.training == dora.run_file.training
