"""Attention over a pack, for stock transformers models.

A model with ``attn_implementation=PACKED`` that is called with ``pack_layout=`` lets every token see its
ancestors in the trie, and nothing else. Nothing in the model is patched: transformers' AttentionInterface calls
us, and the layout does the work.

    backend     where                  how
    bucketed    CPU                    batched products of segments of like sizes            bucketed.py
    flex        CUDA with triton       FlexAttention with a block mask                       masked.py
    masked      everywhere else        scaled_dot_product_attention with a mask matrix       masked.py

Shape letters: T tokens of the pack, H query heads, G key heads, K head size.
"""

import importlib.util
from typing import Any, Literal

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from lorasmith.engine.bucketed import lay_out_buckets
from lorasmith.engine.layout import PackLayout, Scores
from lorasmith.engine.masked import lay_out_mask
from lorasmith.errors import TrainingError
from lorasmith.packing.trie import Pack

PACKED = "lorasmith_packed"

Backend = Literal["bucketed", "flex", "masked"]


def lay_out_attention(
    pack: Pack, backend: Backend, device: torch.device | str, product_dtype: torch.dtype | None = None
) -> PackLayout:
    """Return the layout of ``pack`` for ``backend``; ``product_dtype`` is for the bucketed one."""
    if backend == "bucketed":
        return lay_out_buckets(pack, device, product_dtype)
    return lay_out_mask(pack, device, use_flex=backend == "flex")


@torch.compiler.disable
def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    pack_layout: PackLayout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return attention outputs [1, T, H, K] for ``query`` [1, H, T, K], ``key`` and ``value`` [1, G, T, K].

    Registered with transformers' AttentionInterface.
    A compiled layer leaves its graph here: the sizes differ from pack to pack.
    """
    if pack_layout is None:
        raise TrainingError(
            f'attn_implementation="{PACKED}" works on packs only: call the model with pack_layout=, '
            'or load it with attn_implementation="sdpa".'
        )
    if kwargs.get("s_aux") is not None:
        raise TrainingError(f"{type(module).__name__} uses attention sinks, which packs do not have yet.")
    how = Scores(scaling, sliding_window, softcap, dropout if module.training else 0.0)
    return pack_layout.attend(query, key, value, how), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The layout says what each token sees; a mask of the model's own would only cost memory."""


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _no_mask)


def choose_backend(model: PreTrainedModel, device: torch.device) -> Backend:
    """Return the fastest backend that computes ``model`` on ``device``."""
    if device.type == "cpu":
        return "bucketed"
    if device.type == "cuda" and why_not(model, "flex", device) is None:
        return "flex"
    return "masked" if why_not(model, "masked", device) is None else "bucketed"


def why_not(model: PreTrainedModel, backend: Backend, device: torch.device) -> str | None:
    """Return why ``backend`` cannot compute ``model`` on ``device``, in words, or None if it can."""
    config = model.config.get_text_config()
    if backend == "flex":
        if device.type != "cuda":
            return f"FlexAttention has no backward pass on {device.type}"
        if importlib.util.find_spec("triton") is None:
            return "FlexAttention needs triton, which is not installed"
        if getattr(config, "attention_dropout", None):
            return f"FlexAttention has no dropout, and {config.model_type} uses it in attention"
    if backend == "masked" and getattr(config, "attn_logit_softcapping", None):
        return f"{config.model_type} caps its attention scores, which scaled_dot_product_attention cannot"
    return None


def why_not_packed(model: PreTrainedModel) -> str | None:
    """Return why ``model`` cannot be trained on packs, in words, or None if it can."""
    config = model.config.get_text_config()
    if not getattr(model, "_supports_attention_backend", False):
        return (
            f"{config.model_type} has attention of its own and does not use transformers' AttentionInterface"
        )
    unknown = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unknown:
        return f"{config.model_type} has layers of the kind {', '.join(sorted(unknown))}"
    return None
