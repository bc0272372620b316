"""Attention over a pack equals dense attention under the mask that the trie means."""

import warnings

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from lorasmith.data.tokens import IGNORE_INDEX, TokenizedExample
from lorasmith.engine.attention import (
    choose_backend,
    lay_out_attention,
    packed_attention,
    why_not,
    why_not_packed,
)
from lorasmith.engine.masked import lay_out_mask
from lorasmith.errors import TrainingError
from lorasmith.packing.trie import pack_examples


def make_pack():
    rows = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 9], [1, 2, 3, 4, 8, 8, 8, 8], [7, 7]]
    examples = []
    for ids in rows:
        labels = np.full(len(ids), IGNORE_INDEX, np.int32)
        labels[-1] = ids[-1]
        examples.append(TokenizedExample(np.array(ids, np.int32), labels, "t:1"))
    (pack,) = pack_examples(examples, range(len(rows)), max_tokens=100, min_prefix_tokens=2)
    return pack


def visible(pack, window=None):
    """Return [T, T]: whether a token sees another, by walking up the segments."""
    segment_of = np.zeros(pack.num_tokens, int)
    for index, segment in enumerate(pack.segments):
        segment_of[segment.start : segment.stop] = index
    sees = np.zeros((pack.num_tokens, pack.num_tokens), bool)
    for query in range(pack.num_tokens):
        family, segment = set(), segment_of[query]
        while segment >= 0:
            family.add(segment)
            segment = pack.segments[segment].parent
        for key in range(pack.num_tokens):
            distance = pack.position_ids[query] - pack.position_ids[key]
            sees[query, key] = segment_of[key] in family and 0 <= distance < (window or 10**6)
    return torch.from_numpy(sees)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize(
    ("backend", "softcap", "value_size"),
    [
        ("bucketed", None, 8),
        ("bucketed", 1.5, 8),
        ("bucketed", None, 5),
        ("masked", None, 8),
        ("masked", None, 5),
    ],
)
def test_it_equals_dense_attention(backend, window, softcap, value_size):
    pack = make_pack()
    T, H, G, K = pack.num_tokens, 4, 2, 8
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, H, T, K, generator=generator), torch.randn(1, G, T, K, generator=generator)
    value = torch.randn(1, G, T, value_size, generator=generator)
    out, _ = packed_attention(
        torch.nn.Module(),
        query,
        key,
        value,
        None,
        scaling=0.3,
        sliding_window=window,
        softcap=softcap,
        pack_layout=lay_out_attention(pack, backend, "cpu"),
    )
    scores = query @ key.repeat_interleave(H // G, 1).transpose(2, 3) * 0.3
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    shares = scores.masked_fill(~visible(pack, window), float("-inf")).softmax(-1)
    expected = (shares @ value.repeat_interleave(H // G, 1)).transpose(1, 2)
    assert out.shape == (1, T, H, value_size)
    assert torch.allclose(out, expected, atol=1e-6)


def test_without_a_layout_the_way_out_is_said(tiny_llama):
    tiny_llama.set_attn_implementation("lorasmith_packed")
    with pytest.raises(TrainingError, match="pack_layout="):
        tiny_llama(torch.tensor([[1, 2]]))


def test_what_cannot_be_packed_is_named(tiny_llama):
    assert why_not_packed(tiny_llama) is None
    tiny_llama.config.layer_types = ["full_attention", "chunked_attention"]
    assert "chunked_attention" in str(why_not_packed(tiny_llama))
    tiny_llama._supports_attention_backend = False
    assert "AttentionInterface" in str(why_not_packed(tiny_llama))


@pytest.mark.parametrize("window", [None, 2])
def test_the_mask_function_is_the_trie(window):
    pack = make_pack()
    layout = lay_out_mask(pack, "cpu", use_flex=True)
    every = torch.arange(pack.num_tokens)
    assert torch.equal(layout.sees(every[:, None], every[None, :], window), visible(pack, window))
    blocks = layout._mask(window)  # what FlexAttention gets
    assert torch.equal(
        create_mask(blocks.mask_mod, None, None, *2 * (pack.num_tokens,), device="cpu")[0, 0],
        visible(pack, window),
    )


@pytest.mark.slow
def test_flex_attention_forward_equals_dense_attention():
    """Its backward pass exists on CUDA only; see tests marked gpu."""
    pack = make_pack()
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, pack.num_tokens, 16, generator=generator)
    key, value = (torch.randn(1, 2, pack.num_tokens, 16, generator=generator) for _ in range(2))
    outs = []
    for backend in ("flex", "bucketed"):
        layout = lay_out_attention(pack, backend, "cpu")
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own, about this torch build
            out, _ = packed_attention(
                torch.nn.Module(), query, key, value, None, scaling=0.25, softcap=1.5, pack_layout=layout
            )
        outs.append(out)
    assert torch.allclose(*outs, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_flex_attention_backward_equals_bucketed_on_cuda():
    pack = make_pack()
    gradients = []
    for backend in ("flex", "bucketed"):
        generator = torch.Generator("cuda").manual_seed(0)
        inputs = [
            torch.randn(1, heads, pack.num_tokens, 64, generator=generator, device="cuda").requires_grad_()
            for heads in (4, 2, 2)
        ]
        layout = lay_out_attention(pack, backend, "cuda")
        out, _ = packed_attention(torch.nn.Module(), *inputs, None, scaling=0.125, pack_layout=layout)
        out.sin().sum().backward()
        gradients.append([x.grad for x in inputs])
    for flex, bucketed in zip(*gradients, strict=True):
        assert torch.allclose(flex, bucketed, atol=1e-2)


def test_the_backend_is_chosen_by_device_and_model(tiny_llama, monkeypatch):
    cuda = torch.device("cuda", 0)
    assert choose_backend(tiny_llama, torch.device("cpu")) == "bucketed"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert choose_backend(tiny_llama, cuda) == "flex"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_backend(tiny_llama, cuda) == "masked"
    assert "triton" in str(why_not(tiny_llama, "flex", cuda))
    tiny_llama.config.attn_logit_softcapping = 30.0
    assert choose_backend(tiny_llama, cuda) == "bucketed"
    assert "caps" in str(why_not(tiny_llama, "masked", cuda))
    assert "backward" in str(why_not(tiny_llama, "flex", torch.device("cpu")))
