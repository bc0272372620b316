"""The FLOP that the benchmarks count are those that torch counts."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from side_by_side.flops import Work, count_work, read_shape

R, NUM_TOKENS, NUM_LEARNT = 3, 11, 4


def test_a_step_needs_what_torch_counts(tiny_base_folder):
    model = AutoModelForCausalLM.from_pretrained(
        tiny_base_folder, attn_implementation="eager", dtype=torch.float32
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(r=R, target_modules=names))
    model.enable_input_require_grads()  # so that the first layer's inputs get gradients too, as the formula has it
    with FlopCounterMode(display=False) as counter:
        logits = model(
            input_ids=torch.arange(NUM_TOKENS)[None], use_cache=False, logits_to_keep=NUM_LEARNT
        ).logits
        logits.sum().backward()

    # Eager attention computes all pairs, seen or not.
    work = Work(1, NUM_TOKENS, NUM_LEARNT, num_pairs=NUM_TOKENS**2)
    assert counter.get_total_flops() == read_shape(str(tiny_base_folder), R).step_flop(work)


def test_an_example_has_a_pair_for_each_key_that_a_query_sees():
    assert count_work([1, 3], num_learnt=2) == Work(2, 4, 2, 1 + 6)


def test_sharing_takes_work_away_in_proportion_to_the_tokens_left_out(tiny_base_folder):
    shape = read_shape(str(tiny_base_folder), R)
    work = count_work([10, 10], num_learnt=6)

    assert shape.shared_step_flop(work, 20) == shape.step_flop(work)
    saved = shape.step_flop(work) - shape.shared_step_flop(work, 15)
    assert saved == pytest.approx(shape.step_flop(count_work([10, 10], num_learnt=0)) / 4)
