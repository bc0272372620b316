"""Adapters come and go while others are asked; what cannot share a batch is refused by name."""

import json
import shutil

import openai
import pytest
import torch
from peft import LoraConfig, get_peft_model

from conftest import make_tiny_model
from lorasmith.errors import AdapterError, BaseModelError, SettingsError
from lorasmith.files import write_checksums
from lorasmith.generation.sampling import SamplingSettings
from lorasmith.model.adapter import load_adapter, save_adapter
from lorasmith.model.found import find_adapted
from lorasmith.model.method_settings import METHODS
from lorasmith.model.methods import attach_adapter
from lorasmith.serve.adapters import AdaptedRows, read_lora
from lorasmith.serve.models import name_runs, open_models
from serve.conftest import make_adapter, open_service, serving

QUESTION = [{"role": "user", "content": "When is payday?"}]


@pytest.fixture(scope="module")
def client(tiny_base_folder, adapters):
    folder = adapters["alpha"].parent
    service = open_service(
        tiny_base_folder, {"alpha": adapters["alpha"]}, adapter_folders=[folder], max_models=3
    )
    with (
        serving(service) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def change(client, what, **values):
    return client.post(f"/{what}_lora_adapter", body=values, cast_to=str)


def test_an_adapter_is_loaded_asked_and_unloaded(client, adapters, lone_chats):
    said = change(client, "load", lora_name="late", lora_path=str(adapters["beta"]))
    assert said == "Success: LoRA adapter 'late' added successfully."
    assert [model.id for model in client.models.list()] == ["alpha", "late", "tiny"]
    reply = client.chat.completions.create(model="late", messages=QUESTION, max_tokens=12)
    alone = lone_chats["beta"].ask("When is payday?", sampling=SamplingSettings(max_tokens=12))
    assert reply.choices[0].message.content == alone.text
    with pytest.raises(openai.BadRequestError, match="The name late is taken"):
        change(client, "load", lora_name="late", lora_path=str(adapters["gamma"]))
    change(client, "load", lora_name="late", lora_path=str(adapters["gamma"]), load_inplace=True)
    reply = client.chat.completions.create(model="late", messages=QUESTION, max_tokens=12)
    alone = lone_chats["gamma"].ask("When is payday?", sampling=SamplingSettings(max_tokens=12))
    assert reply.choices[0].message.content == alone.text
    with pytest.raises(openai.BadRequestError, match="3 models are served, as many as max_models allows"):
        change(client, "load", lora_name="more", lora_path=str(adapters["gamma"]))
    assert "removed" in change(client, "unload", lora_name="late")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="late", messages=QUESTION)


def test_only_allowed_folders_are_opened(client, adapters, tmp_path):
    shutil.copytree(adapters["beta"], tmp_path / "beta")
    (adapters["alpha"].parent / "link").symlink_to(tmp_path / "beta")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    outside = [tmp_path / "beta", adapters["alpha"].parent / "link", adapters["alpha"] / ".." / ".."]
    for path in (*outside, "~", "~nobody/x", "\0", tmp_path / "loop", "x" * 5000):
        with pytest.raises(
            openai.BadRequestError, match="is not in a folder that this server loads adapters from"
        ):
            change(client, "load", lora_name="other", lora_path=str(path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny", "The name tiny is taken"),
        ("a b", "cannot be a model's name"),
        ("../x", "cannot be a model's name"),
    ],
)
def test_names_are_checked(client, adapters, name, message):
    with pytest.raises(openai.BadRequestError, match=message):
        change(client, "load", lora_name=name, lora_path=str(adapters["beta"]), load_inplace=True)


def test_what_is_not_there_cannot_be_unloaded(client):
    with pytest.raises(openai.NotFoundError, match="There is no model 'delta'"):
        change(client, "unload", lora_name="delta")
    with pytest.raises(openai.BadRequestError, match="tiny is the base, which stays"):
        change(client, "unload", lora_name="tiny")


@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to .True.:UserWarning")
@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"use_dora": True}, "it is a DoRA adapter"),
        ({"modules_to_save": ["norm"]}, "it keeps whole layers of its own"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "it holds .*embed_tokens.base_layer"),
    ],
)
def test_an_adapter_that_cannot_share_a_batch_is_refused(tmp_path, config, why):
    model = make_tiny_model("qwen")
    make_adapter(tmp_path / "odd", make_tiny_model("qwen"), seed=1, **config)
    with pytest.raises(AdapterError, match=rf"cannot share a batch with others: {why}.*[Mm]erge it"):
        read_lora(model, tmp_path / "odd")


METHODS_SERVED = {"lora", "rslora", "lora_plus", "pissa", "olora"}
SIZES = {
    "adalora": {"init_r": 4, "target_r": 2},
    "oft": {"oft_block_size": 8},
    "boft": {"boft_block_size": 4},
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's notes on BOFT and OFT
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"full"}))
def test_an_adapter_of_each_method_is_served_as_it_answers_alone_or_refused_by_name(
    method, tmp_path, tiny_base_folder
):
    settings = METHODS[method].model_validate({"name": method, **SIZES.get(method, {})})
    adapted = attach_adapter(make_tiny_model("llama"), settings, seed=1, num_steps=10)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.full_like(parameter, 0.05).bernoulli_(0.5) * 0.5)
    save_adapter(adapted, tmp_path / method)
    if method not in METHODS_SERVED:
        way_out = "lorasmith ask" if settings.uses_virtual_tokens else "lorasmith merge"
        with pytest.raises(AdapterError, match=rf"(?i)it is a {method}|{adapted.peft_type.value}.*{way_out}"):
            open_models(
                [("odd", tmp_path / method)], base=str(tiny_base_folder), device="cpu", dtype="float32"
            )
        return
    served = open_models(
        [("one", tmp_path / method)], base=str(tiny_base_folder), device="cpu", dtype="float32"
    )
    ids = torch.tensor([[1, 5, 9, 14]])
    rows = AdaptedRows(served.model)
    rows.choose([served.find("one").adapter])
    alone = load_adapter(load_base_of(served), tmp_path / method)
    with torch.no_grad():
        assert torch.allclose(served.model(ids).logits, alone(ids).logits, atol=1e-4)
        rows.choose([None])
        assert not torch.allclose(served.model(ids).logits, alone(ids).logits, atol=1e-2)


def load_base_of(served):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(served.base.root, dtype=torch.float32)


def test_a_run_that_trained_every_weight_is_served_alone(tmp_path, trained_run, tiny_base_folder):
    shutil.copytree(trained_run, tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole" / "adapter")
    shutil.copytree(tiny_base_folder, tmp_path / "whole" / "model")
    write_checksums(tmp_path / "whole" / "model")
    record = json.loads((tmp_path / "whole" / "run.json").read_text())
    record["settings"]["method"] = {"name": "full"}
    (tmp_path / "whole" / "run.json").write_text(json.dumps(record))
    words = name_runs([str(tmp_path / "whole")])
    served = open_models(words, device="cpu", dtype="float32")
    assert [model.name for model in served.list()] == ["whole"]
    assert served.base.chat.recipe == find_adapted(trained_run).recipe
    with pytest.raises(AdapterError, match=r"trained every weight .* Serve it alone: lorasmith serve --run"):
        open_models([("faq", trained_run), *words], device="cpu", dtype="float32")


def test_an_adapter_of_another_base_is_refused(tmp_path, tiny_base_folder, trained_run):
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["dense"])
    get_peft_model(make_tiny_model("gpt_neox"), lora).save_pretrained(tmp_path / "neox")
    with pytest.raises(AdapterError, match=r"is no linear layer of this base. Serve it on the base"):
        read_lora(make_tiny_model("qwen"), tmp_path / "neox")
    make_tiny_model("qwen").save_pretrained(tmp_path / "base")
    shutil.copy(tiny_base_folder / "tokenizer.json", tmp_path / "base")
    shutil.copy(tiny_base_folder / "tokenizer_config.json", tmp_path / "base")
    shutil.copy(tiny_base_folder / "chat_template.jinja", tmp_path / "base")
    with pytest.raises(BaseModelError, match=r"was trained on .* its answers would be noise"):
        open_models([("faq", trained_run)], base=str(tmp_path / "base"), device="cpu", dtype="float32")


def test_a_run_brings_its_base_and_its_recipe(trained_run):
    served = open_models(name_runs([str(trained_run)]), device="cpu", dtype="float32")
    assert served.list()[0].name == "faq"
    run = served.find("faq")
    assert run.chat.recipe == find_adapted(trained_run).recipe
    assert run.parent == served.base.name
    with pytest.raises(SettingsError, match="Nothing to serve"):
        open_models([])
    with pytest.raises(BaseModelError, match="is an adapter, not a base model"):
        open_models([], base=str(trained_run))


def test_runs_are_called_by_their_folders(tmp_path):
    assert [name for name, _ in name_runs(["runs/faq", "runs/faq/adapter", "x=runs/faq"])] == [
        "faq",
        "faq",
        "x",
    ]


def test_the_scaling_is_pefts(adapters, tiny_base_folder, lone_chats):
    """Layer by layer: what we fold into B is what PEFT multiplies by."""
    for name, folder in adapters.items():
        weights = read_lora(make_tiny_model("llama"), folder)
        modules = dict(lone_chats[name]._next_token.model.get_base_model().named_modules())
        adapted = {path for path, module in modules.items() if hasattr(module, "lora_A")}
        assert set(weights.layers) == adapted
        for path, (_, B) in weights.layers.items():
            expected = modules[path].lora_B["default"].weight * modules[path].scaling["default"]
            assert torch.allclose(B, expected)
