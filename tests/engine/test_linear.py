"""The fused LoRA layer gives PEFT's values and gradients, and PEFT's behaviour when it is switched."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from conftest import make_tiny_model
from lorasmith.engine.linear import restore_lora, speed_up_lora


class Block(nn.Module):
    """Projections that share an input, one that does not, and one that reads another input under such a name."""

    def __init__(self, base: type[nn.Linear] = nn.Linear, cross: bool = False) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = base(12, 8), base(12, 4, bias=False), base(12, 4, bias=False)
        self.down_proj = base(4, 6)
        self.cross = cross

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = x * 2 if self.cross else x
        rows = self.q_proj(x)[..., :4] * self.k_proj(other) + self.v_proj(other)
        return self.down_proj(rows)


def adapted(block: nn.Module, **lora) -> nn.Module:
    names = ["q_proj", "k_proj", "v_proj", "down_proj"]
    torch.manual_seed(0)
    model = get_peft_model(block, LoraConfig(**{"r": 3, "target_modules": names, **lora}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.normal_(0, 0.3)
    return model.train()


def run(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the output, and the gradients of x and of everything that trains."""
    torch.manual_seed(7)
    x = x.clone().requires_grad_()
    out = model(x)
    (out.float() * torch.arange(out.numel()).view(out.shape).float().sin()).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert x.grad is not None
    return out.detach(), {**found, "x": x.grad}


def assert_same(left, right, rel=1e-5):
    assert torch.allclose(left[0], right[0], rtol=rel, atol=rel)
    assert left[1].keys() == right[1].keys()
    for name, expected in left[1].items():
        difference = (right[1][name] - expected).float().norm()
        assert difference <= rel * expected.float().norm() + 1e-7, name


X = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))


class OtherLinear(nn.Linear):
    """Stands for a base layer whose weight is not a plain matrix: only its forward may be used."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * 1.5, self.bias)


@pytest.mark.parametrize(
    ("block", "lora"),
    [
        (Block(), {}),
        (Block(), {"target_modules": ["q_proj", "v_proj"]}),
        (Block(), {"target_modules": ["k_proj", "down_proj"]}),
        (Block(cross=True), {}),
        (Block(), {"lora_dropout": 0.5}),
        (Block(), {"use_rslora": True, "lora_alpha": 5}),
        (Block(), {"use_dora": True}),
        (Block(), {"lora_bias": True, "target_modules": ["q_proj", "down_proj"]}),
        (Block(), {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"v_proj": 32}}),
        (Block(OtherLinear), {}),
    ],
    ids=["all", "q-v", "k-down", "cross", "dropout", "rslora", "dora", "bias", "ranks", "other-base"],
)
def test_it_equals_peft(block, lora):
    model = adapted(copy.deepcopy(block), **lora)
    plain = run(model, X)
    assert speed_up_lora(model) == len(lora.get("target_modules", "qkvd"))
    for _ in range(3):  # a group that falls apart does so in the first call
        assert_same(plain, run(model, X))
    restore_lora(model)
    assert_same(plain, run(model, X), rel=0)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_it_works_beside_a_quantised_base(kind):
    bnb = pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")

    def quantise(linear: nn.Linear) -> nn.Module:
        sizes = linear.in_features, linear.out_features
        if kind == "int8":
            made = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
            made.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            made = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, quant_type="nf4")
            made.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            made.support_avx512bf16_for_cpu = False  # its repacked weights give wrong gradients
        return made.to("cpu")

    block = Block()
    torch.manual_seed(3)
    for name, (size_in, size_out) in {"q_proj": (64, 64), "k_proj": (64, 4), "v_proj": (64, 4)}.items():
        setattr(block, name, quantise(nn.Linear(size_in, size_out, bias=False)))
    setattr(block, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)
    model = adapted(block, target_modules=["q_proj", "k_proj", "v_proj"])
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    plain = run(model, x)
    assert speed_up_lora(model) == 3
    assert_same(plain, run(model, x))


def test_it_is_used_and_computes_a_shared_input_once():
    model = adapted(Block())
    speed_up_lora(model)
    x = X.clone().requires_grad_()
    block = model.base_model.model
    outputs = [layer(x) for layer in (block.q_proj, block.k_proj, block.v_proj)]
    assert len({id(out.grad_fn) for out in outputs}) == 1
    assert "LoraProjections" in type(outputs[0].grad_fn).__name__


def test_switched_off_merged_and_several_adapters_are_pefts():
    model = adapted(Block())
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False))
    states = {}
    for fused in (False, True):
        if fused:
            speed_up_lora(model)
        model.eval()
        states[fused, "default"] = model(X)
        with model.disable_adapter():
            states[fused, "off"] = model(X)
        model.set_adapter("second")  # leaves v_proj and down_proj without an adapter
        states[fused, "second"] = model(X)
        model.base_model.set_adapter(["default", "second"])
        states[fused, "both"] = model(X)
        model.set_adapter("default")
        model.merge_adapter()
        states[fused, "merged"] = model(X)
        model.unmerge_adapter()
        states[fused, "unmerged"] = model(X)
    for name in ("default", "off", "second", "both", "merged", "unmerged"):
        assert torch.allclose(states[False, name], states[True, name], atol=1e-5), name
    assert not torch.allclose(states[True, "off"], states[True, "default"])


def test_a_frozen_input_gets_no_gradient_and_costs_none():
    model = adapted(Block())
    speed_up_lora(model)
    out = model(X)
    out.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora" in n)


def test_bfloat16_base_is_closer_to_the_truth_with_float32_products():
    block = Block().bfloat16().float()
    truth = run(adapted(copy.deepcopy(block)), X.bfloat16().float())
    rounded = adapted(block)
    for name, parameter in rounded.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.bfloat16()
    errors = {}
    for product_dtype in (None, torch.float32):
        speed_up_lora(rounded, product_dtype)
        out, gradients = run(rounded, X.bfloat16())
        assert out.dtype is torch.bfloat16
        lora = [n for n in gradients if "lora" in n]
        assert all(gradients[n].dtype is torch.float32 for n in lora)
        errors[product_dtype] = sum(
            float((gradients[n] - truth[1][n]).norm() / truth[1][n].norm()) for n in lora
        )
        assert torch.allclose(out.float(), truth[0], atol=0.1, rtol=0.05)
    assert errors[torch.float32] < errors[None]


def test_adapters_are_saved_as_pefts_own(tmp_path):
    model = get_peft_model(make_tiny_model("llama"), LoraConfig(r=2, target_modules="all-linear"))
    before = {n: p.clone() for n, p in model.state_dict().items()}
    assert speed_up_lora(model) == 14
    assert model.state_dict().keys() == before.keys()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
