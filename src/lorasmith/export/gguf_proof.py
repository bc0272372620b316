"""Prove a .gguf file: llama.cpp and transformers answer from it as the merged model does, at so much perplexity.

merged model  --transformers-->  greedy answers, their logits and perplexity        once
file.gguf     --llama.cpp---->   greedy answers, compared as text                    for each file
file.gguf     --transformers-->  its choice and logits at every token of those answers
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lorasmith.errors import ExportError
from lorasmith.export.llama_cpp import answer_with_llama_cpp
from lorasmith.export.proof import GreedyAnswer, answer_greedily
from lorasmith.model.device import DeviceChoice
from lorasmith.model.found import FoundModel
from lorasmith.model.gguf import read_with_transformers
from lorasmith.model.memory import give_back_freed_memory

NUM_QUESTIONS = 20
# Least share of equal greedy answers. Four bits round so much that no share can be promised: it is only told.
LEAST_AGREEING = {
    "f32": 1.0,
    "f16": 1.0,
    "bf16": 0.9,
    "q8_0": 0.9,
    "q4_0": 0.0,
    "q4_k_m": 0.0,
    "adapter": 1.0,
}
IN_FLOAT32 = DeviceChoice(torch.device("cpu"), torch.float32, "to compare")


@dataclass(frozen=True)
class Expected:
    """What the tuned model answers to ``prompts`` in float32, and how surprised it is by prompts and answers."""

    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[GreedyAnswer, ...]
    texts: tuple[str, ...]  # of the answers, without stop tokens
    beginnings: tuple[tuple[str, ...], ...]  # the text of an answer's first 0, 1, 2 ... tokens
    perplexity: float


@dataclass(frozen=True)
class GgufProof:
    """How a file's answers, logits and perplexity compare with those of the tuned model.

    ``margins`` has one number for each answer of llama.cpp that parts: by how much the tuned model's logit of its
    own token beats the runner-up's where they part. Rounding that moves logits by up to ``max_logit_difference``
    explains a margin of at most twice that. What transformers says is None for an adapter alone: it reads none.
    """

    quant: str
    num_questions: int
    num_same_answers: int
    margins: tuple[float, ...]
    perplexity_merged: float
    num_same_in_transformers: int | None = None
    perplexity_gguf: float | None = None
    max_logit_difference: float | None = None

    def check(self) -> None:
        """Raise ExportError if fewer answers are the same than this quantisation promises."""
        least = LEAST_AGREEING[self.quant]
        if self.num_same_answers < least * self.num_questions:
            margins = ", ".join(f"{margin:.2g}" for margin in self.margins)
            raise ExportError(
                f"llama.cpp answers {self.num_same_answers} of {self.num_questions} questions as the merged model does "
                f"(at {self.quant} at least {least:.0%} are needed), so nothing was kept. Where they part, the merged "
                f"model preferred its own token by these logits: {margins}. {self._what_transformers_says()}"
                "Export with a finer --quant, or without --prove if you have judged the answers yourself."
            )

    def _what_transformers_says(self) -> str:
        if self.perplexity_gguf is None:
            return ""
        return (
            f"From the file transformers answers {self.num_same_in_transformers} as the merged model does; logits move "
            f"by up to {self.max_logit_difference:.2g}, and the perplexity goes from {self.perplexity_merged:.2f} to "
            f"{self.perplexity_gguf:.2f}. "
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def expect(tuned: FoundModel, prompts: Sequence[Sequence[int]]) -> Expected:
    """Return what ``tuned`` answers to ``prompts`` (token ids) by transformers."""
    tokenizer: Any = tuned.tokenizer
    stops = tuned.recipe.stop_token_ids(tokenizer)
    model: Any = tuned.load(IN_FLOAT32)
    answers = answer_greedily(model, prompts, stops)
    losses = [_read(model, p, a)[0] for p, a in zip(prompts, answers, strict=True)]
    del model
    give_back_freed_memory()
    kept = [[token for token in answer.tokens if token not in stops] for answer in answers]
    return Expected(
        tuple(tuple(prompt) for prompt in prompts),
        tuple(answers),
        tuple(tokenizer.decode(tokens) for tokens in kept),
        tuple(tuple(tokenizer.decode(tokens[:n]) for n in range(len(tokens) + 1)) for tokens in kept),
        float(torch.cat(losses).mean().exp()),
    )


def prove(expected: Expected, file: Path, quant: str) -> GgufProof:
    """Return how ``file`` compares with what is expected.

    Raises:
        MissingExtraError: llama.cpp is not installed. BaseModelError: transformers cannot read the file.
    """
    model = read_with_transformers(file)
    losses, same, differences = [], 0, []
    for prompt, answer in zip(expected.prompts, expected.answers, strict=True):
        loss, logits = _read(model, prompt, answer)
        losses.append(loss)
        # Equal choices after equal beginnings, token after token, are the same greedy answer.
        same += logits.argmax(-1).tolist() == list(answer.tokens)
        differences.append(float((logits - answer.logits).abs().max()))
    del model
    give_back_freed_memory()
    margins = _margins(expected, answer_with_llama_cpp(file, expected.prompts))
    return GgufProof(
        quant,
        len(expected.prompts),
        len(expected.prompts) - len(margins),
        margins,
        expected.perplexity,
        same,
        float(torch.cat(losses).mean().exp()),
        max(differences),
    )


def prove_adapter(expected: Expected, base: Path, lora: Path) -> GgufProof:
    """Return how the adapter file ``lora`` over the file ``base`` compares with what is expected."""
    margins = _margins(expected, answer_with_llama_cpp(base, expected.prompts, lora))
    count = len(expected.prompts)
    return GgufProof("adapter", count, count - len(margins), margins, expected.perplexity)


def _margins(expected: Expected, said: Sequence[str]) -> tuple[float, ...]:
    """Return the margin of each answer that parts, at the first token whose text llama.cpp does not say."""
    margins = []
    for answer, text, beginnings, other in zip(
        expected.answers, expected.texts, expected.beginnings, said, strict=True
    ):
        if text.strip() == other.strip():
            continue
        shared = max(n for n, beginning in enumerate(beginnings) if other.startswith(beginning))
        best, second = answer.logits[min(shared, len(answer.tokens) - 1)].topk(2).values.tolist()
        margins.append(best - second)
    return tuple(margins)


def _read(model: Any, prompt: Sequence[int], answer: GreedyAnswer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each token's loss, and the logits at the answer's tokens, float32 [T, V]."""
    ids = torch.tensor([[*prompt, *answer.tokens]])
    with torch.inference_mode():
        logits = model(ids).logits[0, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    return loss, logits[len(prompt) - 1 :]
