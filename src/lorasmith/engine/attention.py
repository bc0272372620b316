"""Attention over a pack, for stock transformers models.

A model loaded with ``attn_implementation=PACKED`` and called with ``pack_layout=`` computes, for every segment
of the pack, attention to its ancestors and to itself::

    segments of a pack      keys that the queries of each segment see
    [P P P P]               P P P P                 (causal)
    [a a a]                 P P P P a a a           (all of P, causal in a)
    [b b]                   P P P P b b             (all of P, causal in b)

Segments of like sizes are computed together as one batched product, so the cost is that of the visible pairs
and not of the square of the pack. Nothing in the model is patched: transformers' AttentionInterface calls us.

Shape letters: T tokens of the pack, H query heads, G key heads, K head size, n segments of a bucket,
Q and S the longest query and key run of that bucket.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from lorasmith.errors import TrainingError
from lorasmith.packing.trie import Pack

PACKED = "lorasmith_packed"
_ROUND_TO = 32  # segments whose lengths round up to the same multiple share a bucket


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """Segments computed as one batched product. Padded places repeat index 0 and are masked or not read."""

    query_index: torch.Tensor  # int64 [n, Q]
    key_index: torch.Tensor  # int64 [n, S]
    distance: torch.Tensor  # int64 [n, Q, S]: position of the query minus that of the key; < 0 is not visible


@dataclass(frozen=True, slots=True, eq=False)
class PackLayout:
    """Where each segment of a pack finds its queries and keys; made once a pack, used by every layer."""

    buckets: tuple[Bucket, ...]
    output_index: (
        torch.Tensor
    )  # int64 [T]: place of each token among the buckets' queries, one after the other
    _masks: dict[tuple[int | None, torch.dtype], list[torch.Tensor]] = field(default_factory=dict)

    def masks(self, sliding_window: int | None, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return, per bucket, the additive mask [n, 1, 1, Q, S]; a token sees ``sliding_window`` tokens with itself."""
        key = (sliding_window, dtype)
        if key not in self._masks:
            self._masks[key] = []
            for bucket in self.buckets:
                hidden = bucket.distance < 0
                if sliding_window is not None:
                    hidden = hidden | (bucket.distance >= sliding_window)
                mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
                mask.masked_fill_(hidden, torch.finfo(dtype).min)
                self._masks[key].append(mask[:, None, None])
        return self._masks[key]


def lay_out_attention(pack: Pack, device: torch.device | str = "cpu") -> PackLayout:
    """Return the layout of ``pack`` on ``device``."""
    visible: list[np.ndarray] = []  # per segment: pack positions of its ancestors' tokens and its own
    for segment in pack.segments:
        own = np.arange(segment.start, segment.stop)
        visible.append(own if segment.parent < 0 else np.concatenate([visible[segment.parent], own]))

    groups: dict[tuple[int, int], list[int]] = {}
    for index, segment in enumerate(pack.segments):
        size = (_round_up(segment.stop - segment.start), _round_up(len(visible[index])))
        groups.setdefault(size, []).append(index)

    buckets: list[Bucket] = []
    output_index = np.zeros(pack.num_tokens, np.int64)
    placed = 0
    for members in groups.values():
        queries = max(pack.segments[index].stop - pack.segments[index].start for index in members)
        keys = max(len(visible[index]) for index in members)
        query_index = np.zeros((len(members), queries), np.int64)
        key_index = np.zeros((len(members), keys), np.int64)
        distance = np.full((len(members), queries, keys), -1, np.int64)
        distance[:, :, 0] = 0  # a padded query sees something, or its softmax would be NaN
        for row, index in enumerate(members):
            own = np.arange(pack.segments[index].start, pack.segments[index].stop)
            seen = visible[index]
            query_index[row, : len(own)] = own
            key_index[row, : len(seen)] = seen
            distance[row, : len(own), : len(seen)] = (
                pack.position_ids[own][:, None] - pack.position_ids[seen][None, :]
            )
            output_index[own] = placed + row * queries + np.arange(len(own))
        placed += len(members) * queries
        buckets.append(
            Bucket(*(torch.from_numpy(array).to(device) for array in (query_index, key_index, distance)))
        )
    return PackLayout(tuple(buckets), torch.from_numpy(output_index).to(device))


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

    Registered with transformers' AttentionInterface. ``softcap`` bounds the scores by tanh, as in Gemma 2.
    """
    if pack_layout is None:
        raise TrainingError(
            f'attn_implementation="{PACKED}" works on packs only: call the model with pack_layout=, '
            'or load it with attn_implementation="sdpa".'
        )
    if kwargs.get("s_aux") is not None:
        raise TrainingError(f"{type(module).__name__} uses attention sinks, which packs do not have yet.")
    heads, size = query.shape[1], query.shape[3]
    key_heads, value_size = key.shape[1], value.shape[3]  # some models have values of another size than keys
    shared = heads // key_heads  # query heads that read one key head
    query_rows = query[0].transpose(0, 1)  # [T, H, K]
    key_rows = key[0].transpose(0, 1)
    value_rows = value[0].transpose(0, 1)

    outputs = []
    masks = pack_layout.masks(sliding_window, torch.float32)
    for bucket, mask in zip(pack_layout.buckets, masks, strict=True):
        n, queries = bucket.query_index.shape
        keys = bucket.key_index.shape[1]
        q = query_rows.index_select(0, bucket.query_index.flatten()).view(n, queries, key_heads, shared, size)
        k = key_rows.index_select(0, bucket.key_index.flatten()).view(n, keys, key_heads, size)
        v = value_rows.index_select(0, bucket.key_index.flatten()).view(n, keys, key_heads, value_size)
        q = q.permute(0, 2, 3, 1, 4).reshape(n, key_heads, shared * queries, size)
        scores = (q @ k.permute(0, 2, 3, 1)) * scaling  # [n, G, shared * Q, S]
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.view(n, key_heads, shared, queries, keys).float() + mask
        shares = torch.softmax(scores, dim=-1).to(value.dtype)
        if dropout > 0.0:
            shares = torch.nn.functional.dropout(shares, dropout, training=module.training)
        out = shares.view(n, key_heads, shared * queries, keys) @ v.permute(0, 2, 1, 3)
        out = out.view(n, key_heads, shared, queries, value_size).permute(0, 3, 1, 2, 4)
        outputs.append(out.reshape(n * queries, heads, value_size))
    gathered = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return gathered.index_select(0, pack_layout.output_index)[None], None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    """The layout says what each token sees; a mask of the model's own would only cost memory."""


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, _no_mask)


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


def _round_up(length: int) -> int:
    return -(-length // _ROUND_TO) * _ROUND_TO
