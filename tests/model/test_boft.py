"""BOFT by its blocks gives PEFT's values and gradients, and PEFT's behaviour when it is switched."""

import copy

import pytest
import torch
from peft import BOFTConfig, get_peft_model
from torch import nn

from conftest import make_tiny_model
from lorasmith.engine.forward import PackForward
from lorasmith.engine.settings import EngineSettings
from lorasmith.model.adapter import load_adapter, save_adapter
from lorasmith.model.boft import rotate_by_blocks, rotate_by_matrices, rotates_by_blocks, spare_boft_kernel
from lorasmith.model.method_settings import METHODS
from lorasmith.model.methods import attach_adapter

X = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))


def adapted(bias: bool = True, **boft) -> nn.Module:
    spare_boft_kernel()
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(12, 8, bias=bias), nn.Linear(8, 6, bias=bias))
    config = BOFTConfig(**{"boft_block_size": 4, "target_modules": ["0", "1"], "init_weights": False, **boft})
    return get_peft_model(block, config).train()  # type: ignore[arg-type]


def run(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the output, and the gradients of x and of everything that trains."""
    torch.manual_seed(7)
    x = X.clone().requires_grad_()
    out = model(x)
    (out * torch.arange(out.numel()).view(out.shape).sin()).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert x.grad is not None
    return out.detach(), {**found, "x": x.grad}


def assert_same(left, right):
    assert torch.allclose(left[0], right[0], rtol=1e-5, atol=1e-5)
    assert left[1].keys() == right[1].keys()
    for name, expected in left[1].items():
        assert torch.allclose(right[1][name], expected, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [2, 4])
def test_values_and_gradients_are_those_of_peft(size, bias, monkeypatch):
    model = adapted(bias=bias, boft_block_size=size)
    plain = run(model)
    assert len(plain[1]) == 5, "two rotations, two scales and x"
    assert rotate_by_blocks(model) == 2
    with monkeypatch.context() as patch:  # nothing of the size of R is made
        patch.setattr(torch, "block_diag", None)
        assert_same(plain, run(model))
    rotate_by_matrices(model)
    assert not any(map(rotates_by_blocks, model.modules()))
    assert_same(plain, run(model))


def test_switched_off_merged_or_with_dropout_it_is_peft():
    model = adapted()
    rotate_by_blocks(model)
    on = model(X)
    with model.disable_adapter():
        assert not torch.allclose(model(X), on, atol=1e-3)
    model.merge_adapter()
    assert torch.allclose(model(X), on, atol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(model(X), on, atol=1e-5)
    dropped = adapted(boft_dropout=0.5)
    plain = run(dropped)
    rotate_by_blocks(dropped)
    assert_same(plain, run(dropped))


def test_a_copy_computes_with_its_own_weights():
    model = adapted()
    rotate_by_blocks(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "boft_s" in name:
                parameter.mul_(2)
    assert not torch.allclose(model(X), other(X), atol=1e-3)


def test_training_and_asking_use_it_and_the_engine_can_do_without(tmp_path):
    method = METHODS["boft"](boft_block_size=4)
    model = attach_adapter(make_tiny_model("llama"), method, seed=0)
    fast = PackForward(model, EngineSettings())
    assert sum(map(rotates_by_blocks, model.modules())) == 14
    assert not any("PEFT" in note for note in fast.notes)
    PackForward(model, EngineSettings(fused_lora=False))
    assert not any(map(rotates_by_blocks, model.modules()))
    save_adapter(model, tmp_path / "adapter")
    opened = load_adapter(make_tiny_model("llama"), tmp_path / "adapter")
    assert sum(map(rotates_by_blocks, opened.modules())) == 14
