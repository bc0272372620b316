"""What the fuzzer found, each by itself: inputs that once ended in a traceback, and what is said of them now."""

import io

import pyarrow
import pyarrow.parquet
import pytest

from lorasmith.cli.run_file import load_run_file
from lorasmith.data.dataset import prepare_dataset
from lorasmith.data.example import Message
from lorasmith.data.prompts import choose_recipe
from lorasmith.data.settings import DataSettings, PromptSettings
from lorasmith.errors import DataError, RecipeError, SettingsError


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("2001-13-99", "month must be in 1..12"),
        ("2001-01-01 00:00:00 +99:99", "a value in it cannot be read"),
        ("1" * 5000, "4300 digits"),
        ("1" + ":59" * 300 + ".5", "too large to convert to float"),
        ("0b_", "invalid literal for int"),
        ("!!int ;", "invalid literal for int"),
        ("!!float ;", "could not convert string to float"),
        ("!!float ''", "a value in it cannot be read"),
        ("!!bool ''", "a value in it cannot be read"),
        ("!!timestamp x", "a value in it cannot be read"),
        ("[" * 2000, "recursion"),
        ("{[1]: 2}", "unhashable"),
        ("[a, b]", r"data\.train is \['a', 'b'\]: input should be a valid string"),
        ("[[a], {}]", r"data\.train is \["),
        ("&a [*a]", "line 2 has an alias"),
        ("[" + "x, " * 30_000 + "]", "a run file has at most 65,536"),
    ],
)
def test_values_that_yaml_stumbles_over(tmp_path, value, said):
    (tmp_path / "run.yaml").write_text(f"data:\n  train: {value}\n")
    with pytest.raises(SettingsError, match=said):
        load_run_file(tmp_path / "run.yaml", environ={})


@pytest.mark.parametrize("name", ["", "[1]", "4", "true", "{a: 1}", "!!binary aGk="])
def test_methods_whose_name_is_no_text(tmp_path, name):
    (tmp_path / "run.yaml").write_text(f"data:\n  train: x.json\nmethod: {{name: {name}, r: 8}}\n")
    with pytest.raises(
        SettingsError, match=r"method\.name is .*, and there is no such method; the methods are lora"
    ):
        load_run_file(tmp_path / "run.yaml", environ={})


def test_a_bomb_of_aliases_is_not_built(tmp_path):
    levels = [f"x{i + 1}: &x{i + 1} [{', '.join([f'*x{i}'] * 9)}]" for i in range(30)]
    (tmp_path / "run.yaml").write_text("\n".join(["x0: &x0 [lol]", *levels]))
    with pytest.raises(SettingsError, match="line 2 has an alias"):
        load_run_file(tmp_path / "run.yaml", environ={})


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize("key", ["method.lora_alpha", "training.weight_decay", "training.learning_rate"])
def test_numbers_that_are_none_are_refused(key, value):
    with pytest.raises(SettingsError, match=key):
        load_run_file(None, ["data.train=x", f"{key}={value}"], environ={})


@pytest.mark.parametrize("name", ["x" * 5000, "a/" * 3000, "~nobody-of-this-name/x", "a\0b"])
def test_names_that_no_file_can_have(tmp_path, tiny_tokenizer, name):
    (tmp_path / "run.yaml").write_text("data:\n  train: " + (name if "\0" not in name else '"a\\0b"') + "\n")
    settings = load_run_file(tmp_path / "run.yaml", environ={})
    recipe, _ = choose_recipe(PromptSettings(), tiny_tokenizer)
    with pytest.raises(DataError, match=r"cannot be opened|does not exist"):
        prepare_dataset(settings.data, recipe, tiny_tokenizer)
    with pytest.raises(SettingsError, match="cannot be read as a template file"):
        choose_recipe(PromptSettings(recipe=name), tiny_tokenizer)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ range(9**9) }}", "Range too big"),
        ("{{ 2.0**9999 }}", "fails on this conversation|cannot be compiled"),
        ("{{ instruction | truncate(-1) }}", "expected length >= 3"),
        ("{{ " + "(" * 300 + ")" * 300 + " }}", "cannot be compiled"),
        ("{{ " + "1" * 5000 + " }}", "cannot be compiled"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails on this conversation"),
        ("{% if 1 %}" * 30 + "{% endif %}" * 30, None),
        ("{% for a in 'x' %}" * 30 + "{% endfor %}" * 30, "cannot be compiled"),
    ],
)
def test_templates_that_jinja_stumbles_over(tmp_path, tiny_tokenizer, source, said):
    (tmp_path / "t.jinja").write_text("{{ instruction }} {{ input }} " + source)
    recipe, _ = choose_recipe(PromptSettings(recipe=str(tmp_path / "t.jinja")), tiny_tokenizer)
    messages = (Message("user", "When?", "Today."),)
    if said is None:
        assert recipe.render_prompt(messages)
        return
    with pytest.raises(RecipeError, match=said):
        recipe.render_prompt(messages)


def parquet(column):
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"instruction": column, "output": ["x"]}), content)
    return content.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b'{"a": ' + b"[" * 20_000, "not a list of rows"),
        ("a.jsonl", b'{"a": ' + b"[" * 20_000, "recursion|not JSON|nested"),
        ("a.parquet", parquet(pyarrow.array([2**62], pyarrow.timestamp("us"))), "is damaged: after row 0"),
        ("a.parquet", b"PAR1" + b"\0" * 40 + b"PAR1", "is not a Parquet file"),
        ("a.parquet", b"", "is not a Parquet file"),
    ],
)
def test_data_that_parsers_stumble_over(tmp_path, tiny_tokenizer, name, content, said):
    (tmp_path / name).write_bytes(content)
    recipe, _ = choose_recipe(PromptSettings(), tiny_tokenizer)
    with pytest.raises(DataError, match=said):
        prepare_dataset(DataSettings(train=str(tmp_path / name)), recipe, tiny_tokenizer)
