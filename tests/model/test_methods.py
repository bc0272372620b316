"""Adapters in memory: where they go, how many numbers they train, and that they start as nothing."""

import pytest
import torch

from conftest import make_tiny_model
from lorasmith.errors import SettingsError
from lorasmith.model.method_settings import AdaLoraSettings, Ia3Settings, LoraSettings
from lorasmith.model.methods import attach_adapter, count_trainable, linear_names

D, MLP, KV, LAYERS = 32, 64, 16, 2  # tiny models: hidden, MLP and key/value widths, layers
LLAMA = [(D, D), (D, KV), (D, KV), (D, D), (D, MLP), (D, MLP), (MLP, D)]
NEOX = [(D, 3 * D), (D, D), (D, MLP), (MLP, D)]  # query, key and value are one matrix


@pytest.mark.parametrize(("family", "layers"), [("llama", LLAMA), ("gpt_neox", NEOX)])
@pytest.mark.parametrize("r", [1, 4])
def test_trainable_count_follows_the_formula(family, layers, r):
    adapted = attach_adapter(make_tiny_model(family), LoraSettings(r=r), seed=0)
    assert count_trainable(adapted) == LAYERS * sum(r * (d_in + d_out) for d_in, d_out in layers)


def test_chosen_modules_in_chosen_layers():
    settings = LoraSettings(r=2, target_modules=("q_proj", "v_proj"), layers_to_transform=(1,))
    adapted = attach_adapter(make_tiny_model("llama"), settings, seed=0)
    assert count_trainable(adapted) == 2 * (D + D) + 2 * (D + KV)
    assert all(".layers.1." in name for name, p in adapted.named_parameters() if p.requires_grad)


def test_all_linear_in_chosen_layers():
    adapted = attach_adapter(make_tiny_model("llama"), LoraSettings(r=2, layers_to_transform=(0,)), seed=0)
    assert count_trainable(adapted) == sum(2 * (a + b) for a, b in LLAMA)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen", "gpt_neox"])
def test_the_output_head_gets_none(family):
    model = make_tiny_model(family)
    head = next(name for name, m in model.named_modules() if m is model.get_output_embeddings())
    assert head not in linear_names(model)
    adapted = attach_adapter(model, LoraSettings(r=2), seed=0)
    assert not hasattr(adapted.get_output_embeddings(), "lora_A")


def test_at_the_start_the_model_is_the_base():
    ids = torch.tensor([[1, 30, 77]])
    base = make_tiny_model("llama")
    before = base(ids).logits
    assert torch.equal(attach_adapter(base, LoraSettings(), seed=0)(ids).logits, before)


def test_seed_decides_the_start_and_nothing_else():
    def start(seed):
        adapted = attach_adapter(make_tiny_model("llama"), LoraSettings(r=2), seed=seed)
        return torch.cat([p.flatten() for n, p in adapted.named_parameters() if "lora_A" in n])

    first = start(3)
    torch.rand(7)
    assert torch.equal(start(3), first)
    assert not torch.equal(start(4), first)


def test_the_callers_random_stream_does_not_move():
    model = make_tiny_model("llama")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    attach_adapter(model, LoraSettings(), seed=0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_adapter_is_float32_and_the_base_is_frozen(dtype):
    adapted = attach_adapter(make_tiny_model("llama").to(dtype), LoraSettings(), seed=0)
    for name, parameter in adapted.named_parameters():
        is_adapter = "lora_" in name
        assert parameter.requires_grad is is_adapter
        assert parameter.dtype is (torch.float32 if is_adapter else dtype)
    assert not adapted.training


def test_unknown_modules_are_told_with_those_that_exist():
    with pytest.raises(SettingsError, match=r"names query, which this model does not have.*k_proj.*q_proj"):
        attach_adapter(make_tiny_model("llama"), LoraSettings(target_modules=("q_proj", "query")), seed=0)


@pytest.mark.parametrize("layers", [(), (2,), (-1,)])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(SettingsError, match="layers 0 to 1"):
        attach_adapter(make_tiny_model("llama"), LoraSettings(layers_to_transform=layers), seed=0)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (AdaLoraSettings(tinit=8, tfinal=3), "method.name=adalora.*budgeting phase"),
        (
            Ia3Settings(target_modules=("k_proj",), feedforward_modules=("down_proj",)),
            "method.name=ia3.*subset",
        ),
    ],
)
def test_settings_that_peft_refuses_are_told_with_its_words(settings, text):
    with pytest.raises(SettingsError, match=text):
        attach_adapter(make_tiny_model("llama"), settings, seed=0, num_steps=10)


def test_peft_gets_every_setting():
    settings = LoraSettings(
        r=3,
        lora_alpha=5,
        lora_dropout=0.1,
        target_modules=("q_proj",),
        use_rslora=True,
        layers_to_transform=(1,),
    )
    config = settings.to_peft()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora) == (3, 5, 0.1, True)
    assert config.target_modules == {"q_proj"}
    assert config.layers_to_transform == [1]


@pytest.mark.parametrize("wrong", [{"r": 0}, {"lora_alpha": 0}, {"lora_dropout": 1.0}, {"rank": 4}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LoraSettings(**wrong)
