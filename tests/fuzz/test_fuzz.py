"""No input reaches the user as a traceback: generated files, settings, templates and adapters, most of them wrong.

A small part runs with the other tests. All of it, 100,000 inputs or as many as wanted (docs/reliability.md):

    LORASMITH_FUZZ=100000 LORASMITH_FUZZ_SEED=1 python -m pytest tests/fuzz
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import hypothesis
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from conftest import make_tiny_model
from lorasmith.cli.run_file import RunFile, load_run_file
from lorasmith.data.dataset import examine_dataset, raise_faults
from lorasmith.data.example import Message
from lorasmith.data.prompts import PromptRecipe, choose_recipe
from lorasmith.data.settings import DataSettings, PromptSettings
from lorasmith.errors import AdapterError, LorasmithError, RecipeError, RunError, SettingsError
from lorasmith.model.adapter import load_adapter
from lorasmith.model.adapter_folder import named_base, read_adapter_config
from lorasmith.model.base import BaseRef
from lorasmith.model.run_record import RunRecord, read_run_record, write_run_record

from .inputs import adapter_changes, data_files, mutations, overrides, run_files, templates

# hypothesis says so of a large input, and it makes large ones.
pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")

NUM_INPUTS = int(os.environ.get("LORASMITH_FUZZ", "1600"))
SEED = os.environ.get("LORASMITH_FUZZ_SEED")
SHARES = {"data": 0.5, "run file": 0.2, "overrides": 0.1, "template": 0.1, "run.json": 0.05, "adapter": 0.05}
assert sum(SHARES.values()) == pytest.approx(1)


def fuzz(name, **inputs):
    """Give a test its share of the inputs: the same ones each time, or those of LORASMITH_FUZZ_SEED."""

    def decorate(test):
        test = hypothesis.settings(
            max_examples=round(NUM_INPUTS * SHARES[name]),
            derandomize=SEED is None,
            suppress_health_check=[
                HealthCheck.too_slow,
                HealthCheck.data_too_large,
                HealthCheck.large_base_example,
            ],
        )(given(**inputs)(test))
        return test if SEED is None else hypothesis.seed(int(SEED))(test)

    return decorate


@pytest.fixture(scope="module")
def folder():
    """A folder in memory where there is one: every input is written, and synced, several times."""
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=place if os.access(place, os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture(scope="module")
def recipe(tiny_tokenizer):
    return choose_recipe(PromptSettings(), tiny_tokenizer)[0]


@fuzz(
    "data",
    file=data_files(),
    policy=st.fixed_dictionaries(
        {
            "on_bad_row": st.sampled_from(["error", "skip"]),
            "overlong": st.sampled_from(["error", "drop", "truncate"]),
            "format": st.sampled_from(["auto", "auto", "alpaca", "messages"]),
            "max_seq_len": st.sampled_from([16, 512]),
        }
    ),
)
def test_data_is_read_or_refused_and_every_row_is_accounted_for(folder, recipe, tiny_tokenizer, file, policy):
    name, content = file
    (folder / name).write_bytes(content)
    settings = DataSettings(train=str(folder / name), cache_dir=str(folder / "cache"), **policy)
    try:
        dataset = examine_dataset(settings, recipe, tiny_tokenizer)
        receipt = dataset.receipt  # it cannot be made unless used + skipped + failed = rows read
        assert len(dataset) == receipt.used
        assert len(receipt.faults) == receipt.num_failed
        if name == "rows.jsonl":
            assert receipt.rows_read == content.count(b"\n") + (
                not content.endswith(b"\n") and content != b""
            )
        for example in dataset:
            assert len(example.input_ids) <= settings.max_seq_len
            assert (example.labels >= 0).any()
        json.dumps(receipt.to_json())
        raise_faults(receipt, settings)
        assert receipt.used > 0
    except LorasmithError as error:
        check_text(error)
    finally:
        shutil.rmtree(folder / "cache", ignore_errors=True)


@fuzz("run file", content=run_files)
def test_a_run_file_is_read_or_refused(folder, content):
    (folder / "run.yaml").write_bytes(content)
    load_or_refuse(folder / "run.yaml", ())


@fuzz("overrides", words=overrides)
def test_overrides_are_taken_or_refused(words):
    load_or_refuse(None, words)
    load_or_refuse(None, ["data.train=x"], {"LORASMITH_" + word.partition("=")[0]: word for word in words})


def load_or_refuse(path, words, environ=None):
    try:
        settings = load_run_file(path, words, environ=environ or {})
    except SettingsError as error:
        check_text(error)
    else:
        assert RunFile.model_validate(settings.model_dump()) == settings
        settings.method.to_peft()


@fuzz("template", source=templates)
def test_a_template_renders_or_is_refused(folder, tiny_tokenizer, source):
    (folder / "t.jinja").write_bytes(source)
    try:
        recipe, _ = choose_recipe(PromptSettings(recipe=str(folder / "t.jinja")), tiny_tokenizer)
        recipe.fingerprint()
        segments = recipe.render_prompt((Message("user", "When?", "Today."),))
        assert "When?" in "".join(segment.text for segment in segments)
    except (RecipeError, SettingsError) as error:
        check_text(error)


@pytest.fixture(scope="module")
def run_json(recipe, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("run")
    write_run_record(
        run_dir,
        RunRecord(
            name="x", base=BaseRef("a/b", None, "f" * 64), recipe=recipe.to_json(), settings={}, data={}
        ),
    )
    return (run_dir / "run.json").read_bytes()


@fuzz("run.json", data=st.data())
def test_a_run_record_is_read_or_refused(folder, run_json, data):
    (folder / "run.json").write_bytes(data.draw(mutations(run_json)))
    try:
        record = read_run_record(folder)
        PromptRecipe.from_json(record.recipe)
    except (RunError, RecipeError) as error:
        check_text(error)


@pytest.fixture(scope="module")
def adapter_files(tmp_path_factory):
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(make_tiny_model("llama"), config).save_pretrained(str(folder))
    return [(folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")]


@fuzz("adapter", changes=adapter_changes, data=st.data())
def test_an_adapter_is_loaded_or_refused(folder, adapter_files, changes, data):
    config, weights = adapter_files
    config = json.dumps(json.loads(config) | changes).encode()
    if data.draw(st.booleans()):
        config = data.draw(mutations(config))
    else:
        weights = data.draw(mutations(weights))
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    try:
        named_base(read_adapter_config(folder), folder)
        load_adapter(make_tiny_model("llama"), folder)
    except AdapterError as error:
        check_text(error)


def check_text(error):
    """An error's text says something, can be read to its end, and has one way out at least."""
    assert 20 < len(str(error)) < 20_000
