"""Attention over a pack by batched products of few sizes: the fastest way on a CPU.

Every segment sees its ancestors and, causally, itself. Its queries are cut into blocks of at most 128, so that
a long segment does not multiply what the causal mask would throw away, and blocks of like sizes are computed as
one product::

    segments of a pack      blocks of queries      keys that they see
    [P P P P]               P P P P                P P P P
    [a a a]                 a a a                  P P P P a a a
    [b b]                   b b                    P P P P b b        one bucket with the block above

The work is that of the visible pairs and not of the square of the pack. Query heads that share a key head are
folded into rows (grouped-query attention).

Shape letters: T tokens of the pack, H query heads, G key heads, K head size, n blocks of a bucket,
Q and S the longest query and key run of that bucket.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from lorasmith.engine.layout import Scores
from lorasmith.packing.trie import Pack

_BLOCK = 128  # queries: larger blocks compute more hidden pairs, smaller ones gather the same keys more often
_ROUND_TO = 32  # blocks whose lengths round up to the same multiple share a bucket


@dataclass(frozen=True, slots=True, eq=False)
class Bucket:
    """Blocks computed as one batched product. Padded places repeat index 0 and are masked or not read."""

    query_index: torch.Tensor  # int64 [n, Q]
    key_index: torch.Tensor  # int64 [n, S]
    distance: torch.Tensor  # int32 [n, Q, S]: position of the query minus that of the key; < 0 is not visible


@dataclass(frozen=True, slots=True, eq=False)
class BucketedLayout:
    """Where each block of a pack finds its queries and keys; made once a pack, used by every layer."""

    buckets: tuple[Bucket, ...]
    output_index: torch.Tensor  # int64 [T]: place of each token among all buckets' queries, in a row
    product_dtype: torch.dtype | None  # what products are computed in; None: as the queries are
    _masks: dict[int | None, list[torch.Tensor]] = field(default_factory=dict)  # by sliding window

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        """See PackLayout."""
        dtype = self.product_dtype or query.dtype
        heads, size = query.shape[1], query.shape[3]
        # Some models have values of another size than keys.
        key_heads, value_size = key.shape[1], value.shape[3]
        shared = heads // key_heads  # query heads that read one key head
        query_rows = query[0].transpose(0, 1).to(dtype) * scores.scaling  # [T, H, K]
        key_rows, value_rows = (rows[0].transpose(0, 1).to(dtype) for rows in (key, value))

        outputs = []
        for bucket, mask in zip(self.buckets, self._masks_within(scores.sliding_window), strict=True):
            n, queries = bucket.query_index.shape
            keys = bucket.key_index.shape[1]
            q = query_rows.index_select(0, bucket.query_index.flatten())
            q = q.view(n, queries, key_heads, shared, size).permute(0, 2, 3, 1, 4)
            q = q.reshape(n, key_heads, shared * queries, size)
            k = key_rows.index_select(0, bucket.key_index.flatten()).view(n, keys, key_heads, size)
            v = value_rows.index_select(0, bucket.key_index.flatten()).view(n, keys, key_heads, value_size)
            products = q @ k.permute(0, 2, 3, 1)  # [n, G, shared * Q, S]
            if scores.softcap is not None:
                products = torch.tanh(products / scores.softcap) * scores.softcap
            products = products.view(n, key_heads, shared, queries, keys).float().add_(mask)
            shares = torch.softmax(products, dim=-1).to(dtype)
            if scores.dropout > 0.0:
                shares = torch.nn.functional.dropout(shares, scores.dropout)
            out = shares.view(n, key_heads, shared * queries, keys) @ v.permute(0, 2, 1, 3)
            out = out.view(n, key_heads, shared, queries, value_size).permute(0, 3, 1, 2, 4)
            outputs.append(out.reshape(n * queries, heads, value_size))
        rows = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return rows.index_select(0, self.output_index)[None].to(query.dtype)

    def _masks_within(self, sliding_window: int | None) -> list[torch.Tensor]:
        """Return, per bucket, the additive mask float32 [n, 1, 1, Q, S]."""
        if sliding_window not in self._masks:
            masks = []
            for bucket in self.buckets:
                hidden = bucket.distance < 0
                if sliding_window is not None:
                    hidden |= bucket.distance >= sliding_window
                mask = torch.zeros(hidden.shape, device=hidden.device)
                masks.append(mask.masked_fill_(hidden, torch.finfo(torch.float32).min)[:, None, None])
            self._masks[sliding_window] = masks
        return self._masks[sliding_window]


def lay_out_buckets(
    pack: Pack, device: torch.device | str = "cpu", product_dtype: torch.dtype | None = None
) -> BucketedLayout:
    """Return the layout of ``pack`` on ``device``."""
    visible: list[np.ndarray] = []  # per segment: pack positions of its ancestors' tokens and its own
    blocks: list[tuple[np.ndarray, np.ndarray]] = []  # pack positions of queries, and of the keys they see
    for segment in pack.segments:
        own = np.arange(segment.start, segment.stop)
        above = visible[segment.parent] if segment.parent >= 0 else own[:0]
        visible.append(np.concatenate([above, own]))
        blocks += [
            (own[low : low + _BLOCK], visible[-1][: len(above) + low + _BLOCK])
            for low in range(0, len(own), _BLOCK)
        ]
    groups: dict[tuple[int, int], list[int]] = {}
    for index, (own, seen) in enumerate(blocks):
        groups.setdefault((_round_up(len(own)), _round_up(len(seen))), []).append(index)

    buckets: list[Bucket] = []
    output_index = np.zeros(pack.num_tokens, np.int64)
    placed = 0
    for members in groups.values():
        queries = max(len(blocks[index][0]) for index in members)
        keys = max(len(blocks[index][1]) for index in members)
        query_index = np.zeros((len(members), queries), np.int64)
        key_index = np.zeros((len(members), keys), np.int64)
        distance = np.full((len(members), queries, keys), -1, np.int32)
        distance[:, :, 0] = 0  # a padded query sees something, or its softmax would be NaN
        for row, index in enumerate(members):
            own, seen = blocks[index]
            query_index[row, : len(own)] = own
            key_index[row, : len(seen)] = seen
            distance[row, : len(own), : len(seen)] = (
                pack.position_ids[own][:, None] - pack.position_ids[seen][None, :]
            )
            output_index[own] = placed + row * queries + np.arange(len(own))
        placed += len(members) * queries
        arrays = (query_index, key_index, distance)
        buckets.append(Bucket(*(torch.from_numpy(array).to(device) for array in arrays)))
    return BucketedLayout(tuple(buckets), torch.from_numpy(output_index).to(device), product_dtype)


def _round_up(length: int) -> int:
    return -(-length // _ROUND_TO) * _ROUND_TO
