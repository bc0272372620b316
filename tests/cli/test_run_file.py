"""Settings come from file < environment < flags, and all faults are told together, with the nearest right name."""

import pytest

from lorasmith.cli.init import render_run_file
from lorasmith.cli.run_file import RunFile, load_run_file, setting_names
from lorasmith.errors import SettingsError
from lorasmith.model.method_settings import LoraSettings


@pytest.fixture
def run_file(tmp_path):
    def write(text: str):
        file = tmp_path / "run.yaml"
        file.write_text(text)
        return file

    return write


def faults(*arguments, **options) -> str:
    with pytest.raises(SettingsError) as caught:
        load_run_file(*arguments, **{"environ": {}, **options})
    return str(caught.value)


def test_file_then_environment_then_flags(run_file):
    file = run_file("data: {train: a.json}\ntraining: {epochs: 1, batch_size: 2, seed: 3}\n")
    environ = {
        "LORASMITH_TRAINING__EPOCHS": "5",
        "LORASMITH_TRAINING__BATCH_SIZE": "6",
        "LORASMITH_CACHE": "/x",
    }
    training = load_run_file(file, ["training.epochs=7"], environ).training
    assert (training.epochs, training.batch_size, training.seed) == (7, 6, 3)


def test_flags_alone_are_enough():
    settings = load_run_file(None, ["data.train=faq.jsonl", "base.model=org/model"], {})
    assert (settings.data.train, settings.base.model) == ("faq.jsonl", "org/model")


@pytest.mark.parametrize("text", ["2e-5", "2.0e-5", "0.00002"])
def test_numbers_are_numbers_also_without_a_dot(run_file, text):
    file = run_file(f"data: {{train: a.json}}\ntraining: {{learning_rate: {text}}}\n")
    assert load_run_file(file, (), {}).training.learning_rate == 2e-5
    assert load_run_file(file, [f"training.learning_rate={text}"], {}).training.learning_rate == 2e-5


def test_all_faults_are_told_together_with_the_nearest_right_name(run_file):
    file = run_file(
        "data: {train: a.json, max_len: 5}\n"
        "training: {learning_rat: 1, epochs: -1}\n"
        "lora: {r: 8}\n"
        "batch_size: 4\n"
    )
    text = faults(file, ["training.warmup_step=3", "nonsense"], environ={"LORASMITH_BASE__DTIPE": "float32"})
    for expected in (
        "8 faults",
        "did you mean training.learning_rate?",
        "training.epochs is -1",
        "greater than 0",
        "there is no section lora; ",
        "batch_size stands at the top; it belongs in a section: training.batch_size",
        "command line: there is no setting training.warmup_step; did you mean training.warmup_steps?",
        '"nonsense" is not of the form section.key=value',
        "LORASMITH_BASE__DTIPE: there is no setting base.dtipe; did you mean base.dtype?",
        "there is no setting data.max_len",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("word", "told"),
    [
        (
            "method.target_modules=q_proj",
            "'q_proj': input should be 'all-linear' or a list, such as [q_proj]",
        ),
        ("prompt.stop=END", "'END': input should be a list, such as [END]"),
        ("training.micro_batch_tokens=many", "'many': input should be a valid integer or 'auto'"),
    ],
)
def test_a_value_that_is_of_none_of_a_settings_kinds_is_one_fault(word, told):
    text = faults(None, ["data.train=a.json", word])
    assert text.startswith("1 fault in the settings:")
    assert text.endswith(f"command line: {word.partition('=')[0]} is {told}")


def test_adalora_must_have_ranks_to_take_away():
    text = faults(None, ["data.train=a.json", "method.name=adalora", "method.init_r=8"])
    assert "method: adalora goes from rank init_r (8) down to target_r (16), which must be smaller" in text


def test_a_setting_in_the_wrong_section_is_found_in_the_right_one(run_file):
    assert "did you mean method.r?" in faults(run_file("data: {train: a.json}\ntraining: {r: 8}\n"))


def test_data_is_needed():
    assert "data.train is missing" in faults(None, ["training.epochs=1"])


def test_a_key_that_stands_twice_is_an_error(run_file):
    text = faults(run_file("data: {train: a.json}\ntraining:\n  epochs: 1\n  seed: 2\n  epochs: 3\n"))
    assert '"epochs" stands twice, again in line 5' in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "holds nothing"),
        ("- a\n- b\n", "holds list"),
        ("a: [", "is not YAML"),
        ("data:\n\ttrain: x", "is not YAML"),
    ],
)
def test_a_file_that_is_no_run_file(run_file, content, expected):
    assert expected in faults(run_file(content))


def test_bytes_that_are_no_text(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(b"data: \xff\xfe")
    assert "is not UTF-8 text" in faults(file)


def test_a_wrong_path_names_the_near_file(run_file):
    file = run_file("data: {train: a.json}\n")
    assert f"Did you mean {file}?" in faults(file.parent / "rum.yaml")


def test_paths_in_the_file_are_relative_to_it(run_file, tmp_path, monkeypatch):
    (tmp_path / "rows.json").write_text("[]")
    file = run_file("data: {train: rows.json, validation: elsewhere.json}\n")
    monkeypatch.chdir("/")
    data = load_run_file(file, (), {}).data
    assert data.train == str(tmp_path / "rows.json")
    assert data.validation == "elsewhere.json"  # not there: left as it is, for its own error


def test_settings_do_not_change_after_they_are_made():
    settings = load_run_file(None, ["data.train=a.json"], {})
    with pytest.raises(ValueError, match="frozen"):
        settings.training.epochs = 5


def test_texts_on_the_command_line_stay_as_they_are():
    words = [
        "data.train=faq #1.json",
        "run.name=42",
        "prompt.system=Answer so: short",
        "data.validation=null",
    ]
    settings = load_run_file(None, words, {})
    assert settings.data.train == "faq #1.json"
    assert settings.run.name == "42"
    assert settings.prompt.system == "Answer so: short"
    assert settings.data.validation is None


def test_a_value_where_a_section_should_be(run_file):
    assert "data is 'rows.json'; it is a section and holds settings, such as train" in faults(
        run_file("data: rows.json\n")
    )


@pytest.mark.parametrize("name", ["2024", "on", "null", "1e5"])
def test_a_name_that_yaml_would_take_for_something_else_is_quoted(name, run_file):
    file = run_file(render_run_file({"data.train": "x.json", "run.name": name}))
    assert load_run_file(file, (), {}).run.name == name


@pytest.mark.parametrize(("name", "like"), [("my run", "my-run"), ("..", "handbook-2")])
def test_a_name_that_no_run_can_have_is_told_one_that_it_can_have(name, like):
    with pytest.raises(SettingsError, match=rf"run.name is '{name}': a run's name has .* as in {like}$"):
        load_run_file(None, ["data.train=x.json", f"run.name={name}"], {})


def test_every_setting_is_described():
    assert all(setting_names().values())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["method.name=prompt", "method.r=8"],
            r"method.r is no setting of prompt, which has num_.*to lora, rslora",
        ),
        (["method.svd_iterations=4"], r"no setting of lora, which has .*; it belongs to pissa"),
        (["method.name=full", "method.r=8"], r"no setting of full, which has no settings at all"),
        (["method.name=lorra"], r"'lorra', and there is no such method; did you mean lora\?"),
        (["method.name=dora", "method.rank=8"], r"there is no setting method.rank"),
    ],
)
def test_a_setting_of_another_method_is_told_whose_it_is(words, told):
    with pytest.raises(SettingsError, match=told):
        load_run_file(None, ["data.train=x.json", *words], {})


def test_a_method_without_a_name_is_lora():
    settings = load_run_file(None, ["data.train=x.json", "method.r=8"], {})
    assert settings.method == LoraSettings(r=8)
    assert RunFile.model_validate(settings.model_dump(mode="json")) == settings


def test_the_run_file_of_init_shows_every_setting_and_can_be_read(tmp_path):
    text = render_run_file({"data.train": "x.json", "training.epochs": 4})
    lora = {f"method.{key}" for key in LoraSettings.model_fields}
    for name in setting_names():
        if name.startswith("method.") and name not in lora:
            continue  # beside LoRA's they would be errors
        assert f"  {name.partition('.')[2]}: " in text.replace("  # ", "  ")
    file = tmp_path / "run.yaml"
    file.write_text(text)
    expected = RunFile(data={"train": "x.json"}, training={"epochs": 4})
    assert load_run_file(file, (), {}) == expected
    # With every comment taken away the file still says the defaults.
    lines = [line.replace("  # ", "  ", 1) for line in text.splitlines() if _is_setting(line)]
    file.write_text("\n".join(lines).replace("train: x.json", "train: x.json"))
    assert load_run_file(file, (), {}) == expected


def _is_setting(line: str) -> bool:
    bare = line.strip().removeprefix("# ")
    keys = {name.partition(".")[2] for name in setting_names()} | set(RunFile.model_fields)
    return bare.split(":")[0] in keys
