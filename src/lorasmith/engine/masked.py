"""Attention over a pack by torch's own kernels and a mask: for GPUs.

A token sees another if that one's segment is its own or an ancestor, and stands before it. Ancestry is one
comparison when segments are numbered in depth-first order: with ``enter`` the number of a segment and ``leave``
the highest number below it, segment a is an ancestor of b if enter[a] <= enter[b] <= leave[a]::

    segments    [P]      [a]      [b]        enter   0  1  2
                 '--------'--------'         leave   2  1  2

FlexAttention takes that as a function, computes which blocks of the mask are empty, and skips them. Where it is
not to be had, scaled_dot_product_attention takes the mask as a matrix.

Shape letters: T tokens of the pack, H query heads, G key heads, K head size.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from lorasmith.engine.layout import Scores
from lorasmith.packing.trie import Pack


@dataclass(frozen=True, slots=True, eq=False)
class MaskedLayout:
    """What every token of a pack sees; made once a pack, used by every layer."""

    enter: torch.Tensor  # int32 [T]: depth-first number of the token's segment
    leave: torch.Tensor  # int32 [T]: highest number at or below it
    position: torch.Tensor  # int32 [T]
    use_flex: bool
    _masks: dict[int | None, Any] = field(default_factory=dict)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        """See PackLayout."""
        mask = self._mask(scores.sliding_window)
        if self.use_flex:
            from transformers.integrations.flex_attention import flex_attention_forward

            out, _ = flex_attention_forward(
                _TRAINING,
                query,
                key,
                value,
                mask,
                scaling=scores.scaling,
                softcap=scores.softcap,
                dropout=scores.dropout,
            )
            return out
        assert scores.softcap is None, "choose_backend and why_not keep models that cap their scores away"
        out = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=scores.dropout,
            scale=scores.scaling,
            enable_gqa=query.shape[1] > key.shape[1],
        )
        return out.transpose(1, 2)

    def sees(self, query: torch.Tensor, key: torch.Tensor, sliding_window: int | None) -> torch.Tensor:
        """Return whether the tokens at ``query`` see those at ``key``; index tensors that broadcast."""
        distance = self.position[query] - self.position[key]
        seen = (self.enter[key] <= self.enter[query]) & (self.enter[query] <= self.leave[key])
        seen = seen & (distance >= 0)
        return seen if sliding_window is None else seen & (distance < sliding_window)

    def _mask(self, sliding_window: int | None) -> Any:
        """Return FlexAttention's BlockMask, or a bool matrix [T, T]."""
        if sliding_window not in self._masks:
            T, device = len(self.position), self.position.device
            if self.use_flex:
                from torch.nn.attention.flex_attention import create_block_mask

                def visible(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
                    return self.sees(query, key, sliding_window)

                mask: Any = create_block_mask(visible, None, None, T, T, device=device)  # type: ignore[arg-type]
            else:
                every = torch.arange(T, device=device)
                mask = self.sees(every[:, None], every[None, :], sliding_window)
            self._masks[sliding_window] = mask
        return self._masks[sliding_window]


_TRAINING = nn.Module()  # transformers asks the calling module only whether it trains


def lay_out_mask(pack: Pack, device: torch.device | str, *, use_flex: bool) -> MaskedLayout:
    """Return the layout of ``pack`` on ``device``."""
    children: list[list[int]] = [[] for _ in pack.segments]
    roots = []
    for index, segment in enumerate(pack.segments):
        (roots if segment.parent < 0 else children[segment.parent]).append(index)
    enter = np.zeros(len(pack.segments), np.int32)
    pending, number = roots[::-1], 0
    while pending:
        index = pending.pop()
        enter[index] = number
        number += 1
        pending += children[index][::-1]
    leave = enter.copy()
    for index in range(len(pack.segments) - 1, -1, -1):  # children stand behind their parents
        parent = pack.segments[index].parent
        if parent >= 0:
            leave[parent] = max(leave[parent], leave[index])
    lengths = [segment.stop - segment.start for segment in pack.segments]
    per_token = (np.repeat(enter, lengths), np.repeat(leave, lengths), pack.position_ids.astype(np.int32))
    return MaskedLayout(*(torch.from_numpy(array).to(device) for array in per_token), use_flex=use_flex)
