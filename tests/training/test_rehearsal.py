"""A rehearsal without weights finds what the real pass keeps alive and computes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lorasmith.engine.forward import PackForward
from lorasmith.engine.settings import EngineSettings
from lorasmith.packing.trie import pack_examples
from lorasmith.training.rehearsal import Rehearsal, _Ledger, copy_without_weights

from .conftest import make_adapted, make_examples

FAMILIES = ["llama", "mistral", "qwen", "gpt_neox"]
PLAIN = EngineSettings(attention="bucketed", compile=False, gradient_checkpointing=False)


def make_pack(count=8):
    return pack_examples(make_examples(count), range(count), max_tokens=4096)[0]


def test_a_block_counts_from_its_birth_to_its_death():
    with _Ledger() as ledger:
        first = torch.ones(1000)  # 4,000 bytes
        view = first.view(10, 100)
        second = view * 2.0  # 8,000 live
        del first, view  # 4,000
        third = second.add_(1.0)  # in place: nothing new
        fourth = torch.cat([third, third])  # 12,000
    assert ledger.peak_bytes == 12_000
    assert ledger.live_bytes == 4_000 + 8_000
    del second, third, fourth
    assert ledger.live_bytes == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_same_is_found_as_with_real_weights(family, checkpointing):
    model = make_adapted(family).train()
    sketch = copy_without_weights(model)
    pack = make_pack()
    found = Rehearsal(sketch, EngineSettings()).of(pack, checkpointing=checkpointing)
    forward = PackForward(model, PLAIN)
    forward.set_checkpointing(checkpointing)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with _Ledger() as ledger:
        forward.summed_loss(pack).backward()
    inputs = 2**15  # ids, positions and masks are copied to the meta device; on the CPU they are there
    assert found.peak_bytes == pytest.approx(ledger.peak_bytes, abs=inputs)
    with FlopCounterMode(display=False) as counter:
        forward.summed_loss(pack).backward()
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_copy_has_the_shapes_and_none_of_the_numbers():
    model = make_adapted()
    sketch = copy_without_weights(model)
    assert {p.device.type for p in sketch.parameters()} == {"meta"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert [p.shape for p in sketch.parameters()] == [p.shape for p in model.parameters()]
    head, embeddings = (
        sketch.get_base_model().lm_head.weight,
        sketch.get_base_model().model.embed_tokens.weight,
    )
    assert head is embeddings, "tied weights stay tied"


def test_recomputing_takes_less_memory_and_more_operations():
    rehearsal = Rehearsal(copy_without_weights(make_adapted()), EngineSettings())
    kept, recomputed = (rehearsal.of(make_pack(16), checkpointing=wanted) for wanted in (False, True))
    assert recomputed.peak_bytes < kept.peak_bytes
    assert recomputed.flops > kept.flops
