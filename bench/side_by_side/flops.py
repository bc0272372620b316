"""How much arithmetic a training step of LoRA needs: the same count for every contender.

For examples without padding, with frozen weights W [out, in] and adapters A [r, in], B [out, r]::

    linear layers   4 * sum(out * in)        a token: X W^T forward, dY W backward; W itself has no gradient
    adapters        6 * sum(r * (in + out))  a token: forward, and both gradients backward
    output head     4 * V * D                a learnt token: nothing else needs logits
    attention       12 * layers * heads * head_size   a pair (query, key it sees): Q K^T and P V, backward twice

An example of n tokens has n (n + 1) / 2 pairs. Norms, activations, softmax and the optimizer are left out, and
so is what a contender does beyond this: padding, recomputation, logits of tokens that nobody learns.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Work:
    """What a step is asked to do, whoever does it."""

    num_examples: int
    num_tokens: int  # of the examples, without padding
    num_learnt: int
    num_pairs: int  # of a query and a key that it sees, causally, within its own example


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes that decide the arithmetic."""

    linear: tuple[tuple[int, int, int], ...]  # (out, in, how many of them), without the output head
    num_layers: int
    attention_width: int  # heads * head_size of the queries
    hidden: int
    vocab: int
    r: int

    def step_flop(self, work: Work) -> float:
        """Return the FLOP that a training step of ``work`` needs."""
        pairs = 12 * self.num_layers * self.attention_width * work.num_pairs
        return self.token_flop * work.num_tokens + self.head_flop * work.num_learnt + pairs

    def shared_step_flop(self, work: Work, num_computed: int) -> float:
        """Return the FLOP of the same step where only ``num_computed`` of its tokens are computed.

        The pairs are taken down in proportion. Shared tokens stand at the beginning, where a token sees few
        others, so this rather counts too little.
        """
        share = num_computed / work.num_tokens
        pairs = 12 * self.num_layers * self.attention_width * work.num_pairs * share
        return self.token_flop * num_computed + self.head_flop * work.num_learnt + pairs

    @property
    def token_flop(self) -> float:
        weights = sum(out * width * count for out, width, count in self.linear)
        adapters = sum(self.r * (out + width) * count for out, width, count in self.linear)
        return 4 * weights + 6 * adapters

    @property
    def head_flop(self) -> float:
        return 4 * self.vocab * self.hidden

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "flop_a_token": self.token_flop, "flop_a_learnt_token": self.head_flop}


def count_work(lengths: Iterable[int], num_learnt: int) -> Work:
    """Return the work of a step whose examples have ``lengths`` tokens."""
    lengths = list(lengths)
    return Work(len(lengths), sum(lengths), num_learnt, sum(n * (n + 1) // 2 for n in lengths))


def read_shape(folder: str, r: int) -> ModelShape:
    """Return the sizes of the transformers model in ``folder``; no weight is read."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counts: dict[tuple[int, int], int] = {}
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            size = (module.out_features, module.in_features)
            counts[size] = counts.get(size, 0) + 1
    text = config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return ModelShape(
        linear=tuple((*size, count) for size, count in sorted(counts.items())),
        num_layers=text.num_hidden_layers,
        attention_width=text.num_attention_heads * head_size,
        hidden=text.hidden_size,
        vocab=text.vocab_size,
        r=r,
    )
