"""Prove that a merged model is base + adapter: the same questions through both, logits and answers compared.

Shapes: N questions, T tokens of a question and its answer, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from lorasmith.data.example import Message
from lorasmith.data.prompts import PromptRecipe
from lorasmith.data.tokens import encode

NUM_QUESTIONS = 12
NUM_QUESTIONS_OF_BASE = 4  # asked of the base alone, to see what the adapter changes
ANSWER_TOKENS = 24  # greedy tokens of each answer that are compared


@dataclass(frozen=True)
class Tolerance:
    """How far a faithful merge may part from base + adapter, by rounding alone.

    Both models are computed in float32, so what differs is how the merged weights were rounded. ``of_range``
    is a share of the spread of all logits; ``of_effect`` a share of what the adapter changes, so it also catches
    a wrong merge of an adapter that changes little.
    """

    of_range: float
    of_effect: float
    agreeing: float  # least share of greedy answers that are the same


TOLERANCES = {
    torch.float32: Tolerance(of_range=1e-4, of_effect=1e-3, agreeing=0.9),
    torch.float16: Tolerance(of_range=0.01, of_effect=0.05, agreeing=0.75),
    torch.bfloat16: Tolerance(of_range=0.05, of_effect=0.25, agreeing=0.5),
}


@dataclass(frozen=True)
class MergeProof:
    """What was compared and how far the two models part.

    Logits are compared at every token of the greedy answers, up to and with the first at which two answers part.
    """

    dtype: str
    way: str  # how the adapter was folded in
    num_questions: int
    num_positions: int  # tokens at which logits were compared
    max_logit_difference: float
    logit_range: float  # largest minus smallest logit of base + adapter
    adapter_effect: float  # largest logit difference between base + adapter and the base alone
    num_same_answers: int
    num_same_prompts: int  # for which the saved chat template alone gives the trained prompt
    tolerance: Tolerance
    update_norm: float | None  # of methods without B A: not known
    fold_seconds: float
    proof_seconds: float

    @property
    def of_range(self) -> float:
        return self.max_logit_difference / self.logit_range

    @property
    def of_effect(self) -> float:
        return self.max_logit_difference / self.adapter_effect

    def __str__(self) -> str:
        return (
            f"{self.num_same_answers} of {self.num_questions} greedy answers are the same ({self.dtype}); logits "
            f"part by at most {self.max_logit_difference:.2g}: {self.of_range:.1e} of their range, "
            f"{self.of_effect:.1e} of what the adapter changes"
        )

    def faults(self) -> list[str]:
        """Return in words where the merged model parts from base + adapter by more than rounding explains."""
        t = self.tolerance
        faults = []
        if not self.of_range <= t.of_range:  # also true for NaN
            faults.append(
                f"logits part by {self.max_logit_difference:.3g}, {self.of_range:.2%} of their range "
                f"(at most {t.of_range:.2%} is rounding)"
            )
        if self.of_effect > t.of_effect and self.of_range <= t.of_range / 10:
            faults.append(
                f"the adapter moves no logit by more than {self.adapter_effect:.2g}, and rounding moves them by "
                f"{self.max_logit_difference:.2g}: whether it was folded in right cannot be told. It has learnt next "
                "to nothing: train longer, or at a higher training.learning_rate"
            )
        elif not self.of_effect <= t.of_effect:
            faults.append(
                f"logits part by {self.of_effect:.1%} of what the adapter changes "
                f"(at most {t.of_effect:.1%} is rounding)"
            )
        if self.num_same_answers < t.agreeing * self.num_questions:
            faults.append(
                f"{self.num_same_answers} of {self.num_questions} greedy answers are the same "
                f"(at least {t.agreeing:.0%} are needed)"
            )
        return faults

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "of_range": self.of_range,
            "of_effect": self.of_effect,
            "faults": self.faults(),
        }


def encode_questions(
    questions: Sequence[Sequence[Message]], recipe: PromptRecipe, tokenizer
) -> tuple[tuple[int, ...], ...]:
    """Return the token ids of each question, as the recipe asks it."""
    return tuple(tuple(int(i) for i in encode(recipe.render_prompt(q), tokenizer)[0]) for q in questions)


@dataclass(frozen=True)
class GreedyAnswer:
    """An answer and the logits that chose it: ``tokens[t]`` is the argmax of ``logits[t]``, float32 [T, V]."""

    tokens: tuple[int, ...]
    logits: torch.Tensor


def answer_greedily(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], batch_size: int = 8
) -> list[GreedyAnswer]:
    """Return each prompt's greedy answer, up to and with its end token, or ANSWER_TOKENS long."""
    # Set, not passed: what a passed one leaves open is filled from the model's own, such as a repetition penalty.
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=ANSWER_TOKENS,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
        return_dict_in_generate=True,
        output_logits=True,
    )
    answers = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        longest = max(len(prompt) for prompt in batch)
        ids = torch.tensor([[stop_ids[0]] * (longest - len(p)) + list(p) for p in batch], device=model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch], device=model.device)
        with torch.inference_mode():
            grown: Any = model.generate(input_ids=ids, attention_mask=mask)  # type: ignore[operator]
        logits = torch.stack(grown.logits, dim=1).float().cpu()
        for i, row in enumerate(grown.sequences[:, longest:].tolist()):
            length = next((t + 1 for t, token in enumerate(row) if token in stop_ids), len(row))
            answers.append(GreedyAnswer(tuple(row[:length]), logits[i, :length]))
    return answers


def compared_length(one: GreedyAnswer, other: GreedyAnswer) -> int:
    """Return how many positions two answers can be compared at: up to the first token at which they part."""
    shorter = min(len(one.tokens), len(other.tokens))
    parted = (t for t in range(shorter) if one.tokens[t] != other.tokens[t])
    return next(parted, shorter - 1) + 1


def largest_difference(some: Sequence[GreedyAnswer], others: Sequence[GreedyAnswer]) -> float:
    """Return the largest absolute difference of logits given the same text before; NaN anywhere makes it NaN."""
    differences = []
    for one, other in zip(some, others, strict=True):
        n = compared_length(one, other)
        differences.append((one.logits[:n] - other.logits[:n]).abs().max())
    return float(torch.stack(differences).max())


def spread(answers: Sequence[GreedyAnswer]) -> float:
    """Return the largest minus the smallest logit."""
    return float(max(a.logits.max() for a in answers) - min(a.logits.min() for a in answers))
