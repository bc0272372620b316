"""Adapters on disk: saved whole, opened by plain PEFT, refused when broken."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from conftest import make_tiny_model
from lorasmith.errors import AdapterError
from lorasmith.model.adapter import load_adapter, save_adapter, update_norm
from lorasmith.model.adapter_folder import named_base
from lorasmith.model.method_settings import LoraSettings
from lorasmith.model.methods import attach_adapter

IDS = torch.tensor([[1, 17, 60, 200, 5, 9]])


def trained(model, seed=0, **settings):
    """Return the model with an adapter whose B is not zero, as after training."""
    adapted = attach_adapter(model, LoraSettings(r=4, lora_alpha=8, **settings), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return adapted


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def folder(tmp_path, tiny_llama):
    """An adapter as plain PEFT leaves it: two files, without checksums."""
    save_adapter(trained(tiny_llama), tmp_path / "adapter")
    (tmp_path / "adapter" / "SHA256SUMS").unlink()
    return tmp_path / "adapter"


def test_plain_peft_opens_it_with_the_same_logits(tmp_path):
    adapted = trained(make_tiny_model("llama"))
    save_adapter(adapted, tmp_path / "adapter")
    opened = PeftModel.from_pretrained(make_tiny_model("llama"), str(tmp_path / "adapter"))
    assert torch.equal(logits(opened), logits(adapted))
    assert not torch.equal(logits(opened), logits(make_tiny_model("llama")))


def test_opens_what_plain_peft_wrote(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    plain = get_peft_model(make_tiny_model("llama"), config).eval()
    plain.save_pretrained(str(tmp_path))
    assert torch.equal(logits(load_adapter(make_tiny_model("llama"), tmp_path)), logits(plain))


def test_settings_that_a_newer_peft_leaves_unset_do_not_matter(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "new_in_1_0": None, "and_this": False}))
    load_adapter(make_tiny_model("llama"), folder)


def test_two_saves_of_one_adapter_are_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        save_adapter(trained(make_tiny_model("llama")), tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_norm_is_that_of_the_product(tiny_llama):
    adapted = trained(tiny_llama)
    squares = [
        float(torch.linalg.matrix_norm(module.get_delta_weight("default").detach()) ** 2)
        for module in adapted.modules()
        if hasattr(module, "get_delta_weight")
    ]
    assert update_norm(adapted) == pytest.approx(sum(squares) ** 0.5, rel=1e-6)


def test_an_adapter_without_effect_is_not_saved(tmp_path, tiny_llama):
    fresh = attach_adapter(tiny_llama, LoraSettings(r=2), seed=0)
    with pytest.raises(AdapterError, match="no effect"):
        save_adapter(fresh, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []
    assert save_adapter(fresh, tmp_path / "step-0", allow_no_effect=True) == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_adapter_leaves_the_old_one_in_place(tmp_path, tiny_llama, bad):
    adapted = trained(tiny_llama)
    save_adapter(adapted, tmp_path / "adapter")
    before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        next(p for n, p in adapted.named_parameters() if "lora_A" in n)[0, 0] = bad
    with pytest.raises(AdapterError, match=r"NaN or infinite numbers in base_model.*lora_A"):
        save_adapter(adapted, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_weights_of_a_bfloat16_base_are_saved_in_float32(tmp_path):
    save_adapter(trained(make_tiny_model("llama").to(torch.bfloat16)), tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_trainable_only_when_asked(folder):
    assert not any(p.requires_grad for p in load_adapter(make_tiny_model("llama"), folder).parameters())
    again = load_adapter(make_tiny_model("llama"), folder, trainable=True)
    assert {n.split(".")[-3] for n, p in again.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_another_width_is_told_in_words(folder):
    from transformers import AutoModelForCausalLM

    config = make_tiny_model("llama").config
    config.intermediate_size = 48
    other = AutoModelForCausalLM.from_config(config)
    with pytest.raises(AdapterError, match=r"layers\.0\.mlp\.\w+ is 48 numbers wide here.*made for 64"):
        load_adapter(other, folder)


def test_another_architecture_is_told_in_words(folder):
    with pytest.raises(AdapterError, match="which this base does not have"):
        load_adapter(make_tiny_model("gpt_neox"), folder)


def test_a_missing_tensor_is_noticed(folder):
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(min(weights))
    save_file(weights, file)
    with pytest.raises(AdapterError, match=r"not complete: of model\S+ it has only lora_B"):
        load_adapter(make_tiny_model("llama"), folder)


def test_a_missing_layer_is_noticed(folder):
    file = folder / "adapter_model.safetensors"
    save_file({key: tensor for key, tensor in load_file(file).items() if "layers.1.mlp.up" not in key}, file)
    with pytest.raises(AdapterError, match=r"not complete: 2 tensors .* such as .*layers\.1\.mlp\.up_proj"):
        load_adapter(make_tiny_model("llama"), folder)


def test_tensors_that_the_config_does_not_ask_for_are_not_dropped_silently(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"].remove("q_proj")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"holds 4 tensors that its adapter_config\.json does not ask for"):
        load_adapter(make_tiny_model("llama"), folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_one_bit_of_a_saved_adapter_is_noticed(tmp_path, tiny_llama, name):
    save_adapter(trained(tiny_llama), tmp_path / "adapter")
    content = bytearray((tmp_path / "adapter" / name).read_bytes())
    content[-20] ^= 1
    (tmp_path / "adapter" / name).write_bytes(content)
    with pytest.raises(AdapterError, match=rf"is damaged: {name} is not as it was written.*SHA256SUMS"):
        load_adapter(make_tiny_model("llama"), tmp_path / "adapter")


def test_not_finite_weights_are_refused_on_load(folder):
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    weights[min(weights)][0, 0] = float("nan")
    save_file(weights, file)
    with pytest.raises(AdapterError, match="NaN"):
        load_adapter(make_tiny_model("llama"), folder)


def test_pickles_are_refused_unopened(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(AdapterError, match=r"adapter_model\.bin, a Python pickle"):
        load_adapter(make_tiny_model("llama"), folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"r": 4}'])
def test_a_damaged_config_is_refused(folder, text):
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        load_adapter(make_tiny_model("llama"), folder)


def test_a_truncated_weight_file_is_refused(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AdapterError, match="damaged"):
        load_adapter(make_tiny_model("llama"), folder)


@pytest.mark.parametrize(
    "name", ["../../secret", "owner/../x", "https://example.org/m", "~/m", "a/b/c", "", None, "x\\..\\y", 3]
)
def test_a_strangers_base_name_is_not_followed(tmp_path, name):
    with pytest.raises(AdapterError):
        named_base({"base_model_name_or_path": name}, tmp_path)


@pytest.mark.parametrize("name", ["gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "/models/llama"])
def test_hub_ids_and_absolute_paths_are_followed(tmp_path, name):
    assert named_base({"base_model_name_or_path": name}, tmp_path) == name


def test_config_names_modules_and_the_base(tmp_path, tiny_llama):
    tiny_llama.name_or_path = "owner/name"
    save_adapter(trained(tiny_llama), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/name"
    assert config["inference_mode"] is True
    assert config["target_modules"] == sorted(config["target_modules"])
    assert len(config["target_modules"]) == 7
