"""How surprised a model is: by reference answers, and by a general text. Prefixes that rows share are read once."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from lorasmith.data.tokens import TokenizedExample, encode, label
from lorasmith.engine.forward import PackForward
from lorasmith.engine.settings import EngineSettings
from lorasmith.errors import DataError
from lorasmith.evaluation.questions import EvaluationRow
from lorasmith.generation.chat import Chat
from lorasmith.packing.trie import pack_examples

_PACK_TOKENS = 2048
_ROWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Surprise:
    """Cross-entropy over ``num_tokens`` tokens: ``loss`` in nats a token."""

    loss: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """As many equally likely tokens would leave the model as unsure; infinite where that is no number."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def to_json(self) -> dict[str, Any]:
        """Return the fields and the perplexity; None where that is infinite, which JSON cannot say."""
        perplexity = self.perplexity
        return {**asdict(self), "perplexity": perplexity if math.isfinite(perplexity) else None}


def answer_surprise(chat: Chat, rows: Sequence[EvaluationRow]) -> Surprise:
    """Return the loss on the reference answers, end token included, as training counts it.

    Raises:
        DataError: a row is longer than the model's context.
    """
    recipe = replace(chat.recipe, learn="last")
    examples = []
    for row in rows:
        ids, is_learnt = encode(recipe.render(row.as_example()), chat.tokenizer)
        if chat.max_context is not None and len(ids) > chat.max_context:
            raise DataError(
                f"{row.where}: the question and its reference have {len(ids)} tokens; the model reads "
                f"{chat.max_context}. Shorten the row, or leave it out."
            )
        examples.append(TokenizedExample(ids, label(ids, is_learnt), row.where))
    return _surprise(chat, examples)


def text_surprise(chat: Chat, passages: Sequence[str]) -> Surprise:
    """Return the loss on plain passages, each read from its beginning, without any prompt."""
    examples = []
    for number, passage in enumerate(passages, start=1):
        ids = np.array(chat.tokenizer(passage, add_special_tokens=True).input_ids, np.int32)
        ids = ids[: chat.max_context]
        examples.append(TokenizedExample(ids, ids, f"passage {number}"))
    return _surprise(chat, examples)


@torch.no_grad()
def surprises(chat: Chat, examples: Sequence[TokenizedExample]) -> list[Surprise]:
    """Return the loss on the learnt tokens of each of ``examples``, at least one in each."""
    sums, counts = np.zeros(len(examples)), np.zeros(len(examples), int)
    with chat.answering() as model:
        bare: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        asks_with = bare.config._attn_implementation
        forward = PackForward(model, EngineSettings())
        try:
            for low in range(0, len(examples), _ROWS_AT_ONCE):
                places = range(low, min(low + _ROWS_AT_ONCE, len(examples)))
                for pack in pack_examples(
                    examples, places, max_tokens=_PACK_TOKENS, share_prefixes=forward.share_prefixes
                ):
                    sums[list(pack.examples)] = -forward.log_probs(pack).double().cpu().numpy()
                    counts[list(pack.examples)] = pack.learnt_of
        finally:
            bare.set_attn_implementation(asks_with)
    return [
        Surprise(total / count, count) for total, count in zip(sums.tolist(), counts.tolist(), strict=True)
    ]


def _surprise(chat: Chat, examples: Sequence[TokenizedExample]) -> Surprise:
    each = surprises(chat, examples)
    num_tokens = sum(one.num_tokens for one in each)
    return Surprise(sum(one.loss * one.num_tokens for one in each) / num_tokens, num_tokens)
