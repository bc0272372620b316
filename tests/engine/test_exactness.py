"""Packs give the loss and the gradients that plain transformers + PEFT gives for the examples one by one."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from conftest import make_tiny_model
from lorasmith.data.tokens import IGNORE_INDEX, TokenizedExample
from lorasmith.engine.forward import PackForward
from lorasmith.engine.settings import EngineSettings
from lorasmith.packing.trie import pack_examples

FAMILIES = ["llama", "mistral", "qwen", "gpt_neox"]


def make_example(ids: list[int], num_learnt: int) -> TokenizedExample:
    labels = np.full(len(ids), IGNORE_INDEX, np.int32)
    labels[len(ids) - num_learnt :] = ids[len(ids) - num_learnt :]
    return TokenizedExample(np.array(ids, np.int32), labels, "test:1")


def adapted(family: str, **lora) -> torch.nn.Module:
    """A tiny model with a LoRA on every linear layer whose B is not zero, so that every part has a gradient."""
    model = get_peft_model(
        make_tiny_model(family),
        LoraConfig(**{"r": 4, "target_modules": "all-linear", **lora}, task_type="CAUSAL_LM"),
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1, generator=generator)
    return model


def gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return found


def plain_loss_and_gradients(model, examples):
    """Sum the losses of each example alone, through the model as transformers and PEFT ship it."""
    model.get_base_model().set_attn_implementation("sdpa")
    total = 0.0
    for example in examples:
        ids = torch.from_numpy(example.input_ids).long()[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        labels = torch.from_numpy(example.labels[1:]).long()
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX)
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def packed_loss_and_gradients(model, examples, max_tokens=512, **switches):
    forward = PackForward(model, EngineSettings(**switches))
    total = 0.0
    for pack in pack_examples(
        examples,
        range(len(examples)),
        max_tokens=max_tokens,
        share_prefixes=forward.share_prefixes,
        min_prefix_tokens=2,
    ):
        loss = forward.summed_loss(pack)
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def assert_same(plain, packed):
    (plain_loss, plain_gradients), (packed_loss, packed_gradients) = plain, packed
    assert packed_loss == pytest.approx(plain_loss, rel=1e-5)
    assert packed_gradients.keys() == plain_gradients.keys()
    # Some gradients are zero but for rounding (one visible token: softmax is constant), hence the second term.
    largest = max(expected.norm() for expected in plain_gradients.values())
    for name, expected in plain_gradients.items():
        difference = (packed_gradients[name] - expected).norm()
        assert difference <= 1e-5 * expected.norm() + 1e-7 * largest, f"{name}: {difference:.2e} apart"


EXAMPLES = [
    make_example([1, 10, 11, 12, 13, 14, 20, 21, 22, 2], 4),
    make_example([1, 10, 11, 12, 13, 14, 20, 21, 30, 31, 2], 3),
    make_example([1, 10, 11, 12, 13, 14, 20, 21, 22, 2], 4),  # equal to the first
    make_example([1, 10, 11, 12, 13, 14, 20, 21, 22], 1),  # a prefix of it
    make_example([1, 10, 11, 12, 13, 14, 20, 40, *range(50, 90), 2], 30),  # longer than Mistral's window
    make_example([5, 2], 1),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"share_prefixes": False},
        {"chunked_loss": False},
        {"fused_lora": False},
        {"attention": "masked"},
        {"attention": "padded"},
        {"attention": "padded", "chunked_loss": False, "fused_lora": False},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_packs_equal_one_by_one(family, switches):
    model = adapted(family).train()
    plain = plain_loss_and_gradients(model, EXAMPLES)
    assert_same(plain, packed_loss_and_gradients(model, EXAMPLES, **switches))


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_can_be_switched_between_packs_and_moves_no_bit(family):
    model = adapted(family, lora_dropout=0.2).train()
    forward = PackForward(model, EngineSettings())
    (pack,) = pack_examples(EXAMPLES, range(len(EXAMPLES)), max_tokens=512, share_prefixes=False)
    found = []
    for wanted in (False, True, False):
        forward.set_checkpointing(wanted)
        torch.manual_seed(0)
        forward.summed_loss(pack).backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name
        assert torch.equal(gradient, found[2][name]), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("product_dtype", ["same", "float32"])
def test_in_bfloat16_the_loss_is_within_a_hundredth(family, product_dtype):
    model = adapted(family).train()
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.bfloat16()
    plain_loss, plain_gradients = plain_loss_and_gradients(model, EXAMPLES)
    loss, found = packed_loss_and_gradients(model, EXAMPLES, product_dtype=product_dtype)
    assert loss == pytest.approx(plain_loss, rel=1e-2)
    for name, expected in plain_gradients.items():
        assert found[name].dtype is torch.float32
        assert torch.cosine_similarity(found[name].flatten(), expected.flatten(), dim=0) > 0.9, name


@pytest.mark.slow
def test_compiled_layers_equal_one_by_one():
    model = adapted("llama").train()
    plain = plain_loss_and_gradients(model, EXAMPLES)
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own, about this torch build
        packed = packed_loss_and_gradients(model, EXAMPLES, compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert_same(plain, packed)


@pytest.mark.parametrize("max_tokens", [12, 50, 60, 70])
def test_the_cut_into_packs_changes_nothing(max_tokens):
    model = adapted("llama").train()
    plain = plain_loss_and_gradients(model, EXAMPLES)
    assert_same(plain, packed_loss_and_gradients(model, EXAMPLES, max_tokens=max_tokens))


@st.composite
def tries(draw):
    """Examples that branch from each other at random places: prefixes of prefixes, equal ones, single tokens."""
    token = st.integers(3, 12)
    examples = [make_example(draw(st.lists(token, min_size=2, max_size=40)), 1)]
    for _ in range(draw(st.integers(1, 6))):
        parent = draw(st.sampled_from(examples)).input_ids.tolist()
        kept = draw(st.integers(0, len(parent)))
        ids = parent[:kept] + draw(st.lists(token, min_size=max(0, 2 - kept), max_size=20))
        examples.append(make_example(ids, draw(st.integers(1, len(ids) - 1))))
    return examples


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_random_tries(family):
    model = adapted(family).train()

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(tries(), st.integers(1, 80))
    def check(examples, max_tokens):
        plain = plain_loss_and_gradients(model, examples)
        assert_same(plain, packed_loss_and_gradients(model, examples, max_tokens=max_tokens))

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_layers_are_kept_exactly(family):
    names = {"llama": "q_proj", "mistral": "q_proj", "qwen": "q_proj", "gpt_neox": "query_key_value"}
    model = adapted(
        family, layers_to_transform=[1], target_modules=[names[family], "dense_h_to_4h", "up_proj"]
    ).train()
    plain = plain_loss_and_gradients(model, EXAMPLES)
    forward = PackForward(model, EngineSettings())
    said = forward.keep_frozen_states("train", EXAMPLES, max_tokens=64, max_bytes=2**30)
    assert said is not None
    assert forward.frozen_layers == 1, said
    # Layer 0 must not run again: break it and see that nothing changes.
    with torch.no_grad():
        for parameter in model.get_base_model().get_decoder().layers[0].parameters():
            parameter.fill_(float("nan"))
    total = 0.0
    for pack in pack_examples(EXAMPLES, range(len(EXAMPLES)), max_tokens=40, min_prefix_tokens=2):
        loss = forward.summed_loss(pack, "train")
        loss.backward()
        total += loss.item()
    assert_same(plain, (total, gradients(model)))


def test_dropout_turns_sharing_off_by_name():
    forward = PackForward(adapted("llama", lora_dropout=0.1), EngineSettings())
    assert not forward.share_prefixes
    assert any("dropout 0.1" in note for note in forward.notes)


def test_dropout_inside_attention_turns_sharing_off_too():
    model = adapted("llama")
    model.get_base_model().config.attention_dropout = 0.1
    assert not PackForward(model, EngineSettings()).share_prefixes
