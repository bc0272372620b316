"""What a step minimises, as the loop sees it; the next token here, pairs in preference.py."""

from typing import Protocol

import torch

from lorasmith.engine.forward import PackForward
from lorasmith.packing.trie import Pack


class Objective(Protocol):
    """What the loop minimises: the sum of ``loss`` over a step's packs, divided by the sum of ``count``."""

    tells: tuple[str, ...]  # names of what else is told of a step, as means

    def count(self, pack: Pack) -> int: ...

    def loss(
        self, forward: PackForward, pack: Pack, name: str | None
    ) -> tuple[torch.Tensor, tuple[float, ...]]:
        """Return the summed loss of ``pack``, with a graph, and the sums behind ``tells``.

        ``name`` is the data set that the pack's examples are numbered in: "train" or "validation".
        """
        ...


class NextToken:
    """Supervised fine-tuning: the cross-entropy of the learnt tokens."""

    tells: tuple[str, ...] = ()

    def count(self, pack: Pack) -> int:
        return pack.num_learnt

    def loss(
        self, forward: PackForward, pack: Pack, name: str | None
    ) -> tuple[torch.Tensor, tuple[float, ...]]:
        return forward.summed_loss(pack, name), ()


NEXT_TOKEN = NextToken()
