"""What eight bits alone change: a model's greedy answers with its weights, or what they meet, rounded as q8_0 rounds.

    python bench/gguf_rounding.py --model merged/handbook --prompts examples/handbook/handbook_eval_ordinary.json

On a CPU llama.cpp rounds the inputs of every product with a q8_0 weight to q8_0 as well, while it computes. In the row
"inputs" all weights stay float32: what that rounding alone costs, however well the weights in a file are rounded.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lorasmith.export.gguf_proof import IN_FLOAT32, NUM_QUESTIONS
from lorasmith.export.proof import answer_greedily, encode_questions
from lorasmith.export.questions import read_questions, spread_evenly
from lorasmith.model.found import find_model
from side_by_side.report import print_table, tell

BLOCK = 32  # numbers that share a scale, in ggml's block_q8_0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a merged folder")
    parser.add_argument("--prompts", type=Path, required=True, help="as for lorasmith export --prompts")
    parser.add_argument("--questions", type=int, default=NUM_QUESTIONS)
    options = parser.parse_args()
    found = find_model(str(options.model), tell=tell)
    questions = spread_evenly(read_questions(options.prompts), options.questions)
    prompts = encode_questions(questions, found.recipe, found.tokenizer)
    stops = found.recipe.stop_token_ids(found.tokenizer)
    model = found.load(IN_FLOAT32)
    expected = answer_greedily(model, prompts, stops)
    rows = []
    for name, of_weights, of_inputs in (
        ("nothing", False, False),
        ("inputs", False, True),
        ("weights", True, False),
        ("both", True, True),
    ):
        with rounded(model, of_weights=of_weights, of_inputs=of_inputs):
            answers = answer_greedily(model, prompts, stops)
        same = sum(one.tokens == other.tokens for one, other in zip(expected, answers, strict=True))
        rows.append((name, f"{same} of {len(prompts)}"))
    print_table(("rounded to q8_0", "same greedy answers"), rows)


@contextmanager
def rounded(model: torch.nn.Module, *, of_weights: bool, of_inputs: bool) -> Iterator[None]:
    """Round the weights of all linear layers, or their inputs as they come, inside the block.

    A head that is tied to the embedding takes the embedding with it, as the one tensor in the file does.
    """
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    weights = [module.weight.detach().clone() for module in linears] if of_weights else []
    hooks = []
    for module in linears:
        if of_weights:
            module.weight.data.copy_(as_q8_0(module.weight.data))
        if of_inputs:
            hooks.append(module.register_forward_pre_hook(lambda module, given: (as_q8_0(given[0]),)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module, weight in zip(linears, weights, strict=bool(weights)):
            module.weight.data.copy_(weight)


def as_q8_0(numbers: torch.Tensor) -> torch.Tensor:
    """Return float32 [..., N x 32] as q8_0 holds it: for 32 numbers a float16 scale, the largest / 127, and int8."""
    blocks = numbers.reshape(-1, BLOCK)
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    steps = torch.where(scales > 0, blocks / scales, 0.0).round()
    return (steps * scales.half().float()).reshape(numbers.shape)


if __name__ == "__main__":
    main()
