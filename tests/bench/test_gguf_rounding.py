"""The benchmark rounds as a q8_0 file does, and puts the weights back."""

import numpy as np
import torch
from gguf import GGMLQuantizationType, dequantize, quantize

from gguf_rounding import as_q8_0, rounded


def test_numbers_are_rounded_as_the_gguf_package_rounds_them():
    numbers = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    numbers[2, :32] = 0
    packed = quantize(numbers.numpy(), GGMLQuantizationType.Q8_0)
    expected = dequantize(packed, GGMLQuantizationType.Q8_0)
    assert np.array_equal(as_q8_0(numbers).numpy(), expected)


def test_weights_and_inputs_are_rounded_inside_the_block_only(tiny_llama):
    ids = torch.arange(3, 40)[None]
    weight = tiny_llama.lm_head.weight.detach().clone()

    def logits():
        with torch.no_grad():
            return tiny_llama(ids).logits

    exact = logits()
    moved = []
    for of_weights, of_inputs in ((True, False), (False, True), (True, True)):
        with rounded(tiny_llama, of_weights=of_weights, of_inputs=of_inputs):
            moved.append(float((logits() - exact).abs().max()))
        assert torch.equal(logits(), exact)
    assert all(0 < difference < 0.5 for difference in moved), moved
    assert torch.equal(tiny_llama.lm_head.weight, weight)
