"""A quantised base: its gradients are those of the dequantised one, before and after an evaluation; what is refused."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

from conftest import make_tiny_model
from lorasmith.cli.run_file import load_run_file, prepare, train
from lorasmith.data.example import Message
from lorasmith.errors import MissingExtraError, SettingsError
from lorasmith.export.merge import merge
from lorasmith.model.base import load_base, resolve_base
from lorasmith.model.device import DeviceChoice
from lorasmith.model.method_settings import METHODS, LoraSettings
from lorasmith.model.methods import attach_adapter, check_method, count_frozen
from lorasmith.model.settings import BaseSettings

EXAMPLE = Path(__file__).parents[2] / "examples" / "alpaca-2023.yaml"
IDS = torch.tensor([[1, 17, 60, 200, 5, 9, 33, 250]])
CPU = DeviceChoice(torch.device("cpu"), torch.float32, "for the test")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs the extra quantized"
)


def adapted(base):
    model = attach_adapter(base, LoraSettings(r=4), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def gradients(model):
    model.train()
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_gradients_are_those_of_the_dequantised_base_also_after_an_evaluation(kind, tiny_base_folder, caplog):
    from peft.utils.integrations import dequantize_module_weight

    base = resolve_base(BaseSettings(model=str(tiny_base_folder)))
    quantised = load_base(base, CPU, quantization=kind)
    plain = load_base(base, CPU)
    num_frozen = count_frozen(plain)
    layers = dict(quantised.named_modules())
    with torch.no_grad():
        for name, layer in plain.named_modules():
            if ".layers." in name and isinstance(layer, torch.nn.Linear):
                assert type(layers[name]).__name__ == {"int8": "Linear8bitLt", "nf4": "Linear4bit"}[kind]
                layer.weight.copy_(dequantize_module_weight(layers[name]))
    model, expected = adapted(quantised), gradients(adapted(plain))
    assert count_frozen(model) == num_frozen
    assert cosine_similarity(gradients(model), expected, dim=0) > 0.999
    with torch.no_grad():
        model.eval()(IDS)  # what spoils 4-bit weights on CPUs with AVX512-bf16
    assert cosine_similarity(gradients(model), expected, dim=0) > 0.999
    assert not caplog.records, "said on the screen once a layer"


@needs_bitsandbytes
@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="needs Linux")
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_unquantised_file_does_not_stay_in_memory(kind, tmp_path, tiny_tokenizer):
    make_tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    base = resolve_base(BaseSettings(model=str(tmp_path)))
    model = load_base(base, CPU, quantization=kind)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight  # still tied


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_the_recipe_of_2023_runs_on_it_and_merges_into_the_unquantised_base(
    kind, tiny_base_folder, training_rows, tmp_path
):
    (tmp_path / "faq.json").write_text(json.dumps(training_rows[:8]))
    words = [
        f"base.model={tiny_base_folder}",
        f"data.train={tmp_path / 'faq.json'}",
        f"base.quantization={kind}",
    ]
    words += ["training.max_steps=2", "training.batch_size=4", "training.warmup_steps=0", "base.device=cpu"]
    words += ["training.learning_rate=1e-2", "engine.threads=1", "base.dtype=float32"]
    reports = list(train(load_run_file(EXAMPLE, words, {}), tmp_path / "run"))
    assert reports[-1].loss < reports[0].loss
    asked = [[Message("user", "What is 3 plus 3?")], [Message("user", "Who?")]]
    assert merge(tmp_path / "run", tmp_path / "merged", prompts=asked, device="cpu").faults() == []
    weights = load_base(resolve_base(BaseSettings(model=str(tmp_path / "merged"))), CPU)
    assert {p.dtype for p in weights.parameters()} == {torch.float32}


def test_how_the_weights_are_held_is_said(tiny_base_folder, training_rows, tmp_path):
    (tmp_path / "faq.json").write_text(json.dumps(training_rows[:4]))
    words = [f"base.model={tiny_base_folder}", f"data.train={tmp_path / 'faq.json'}"]
    words += ["base.quantization=nf4", "base.dtype=float32", "engine.threads=1"]
    said = []
    prepare(load_run_file(None, words, {}), tmp_path / "run", say=said.append)
    assert "Number format: float32 (cpu: float32, as asked); the frozen weights are held as nf4" in said


def test_without_bitsandbytes_the_pip_line_is_told(tiny_base_folder, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else found(n, *a)
    )
    base = resolve_base(BaseSettings(model=str(tiny_base_folder)))
    with pytest.raises(MissingExtraError, match=r"base.quantization=int8 needs .* 'lorasmith\[quantized\]'"):
        load_base(base, CPU, quantization="int8")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("full", r"trains the weights themselves, and base.quantization=nf4 keeps them in whole numbers"),
        ("pissa", r"takes its start out of the base's weights"),
        ("vera", r"was never tried here"),
    ],
)
def test_what_a_quantised_base_cannot_have_is_refused(name, told):
    with pytest.raises(SettingsError, match=told):
        check_method(METHODS[name](), BaseSettings(quantization="nf4"))
