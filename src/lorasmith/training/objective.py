"""What a step minimises, as the loop sees it; the next token here, pairs in preference.py, labels in kto.py."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from lorasmith.data.tokens import TokenizedExample
from lorasmith.engine.forward import PackForward
from lorasmith.packing.trie import Pack
from lorasmith.training.distributed import Team

# Log probabilities of the learnt tokens of each example, float64 [N], as the model is now and without gradient.
Ask = Callable[[Sequence[TokenizedExample]], np.ndarray]


def ask_packs(
    forward: PackForward, packs: Sequence[Pack], indices: range, name: str | None, team: Team
) -> np.ndarray:
    """Return the log probabilities, float64 [N], of the examples at ``indices``, which are in ``packs``.

    The processes of the ``team`` share the packs; all of it call this.
    """
    found = np.zeros(len(indices))
    for place, weight in team.share(packs, forward.cost, evenly=forward.is_sharded):
        log_probs = weight * forward.log_probs(packs[place], name)
        found[np.array(packs[place].examples) - indices.start] += log_probs.double().cpu().numpy()
    return np.array(team.total(*found))


class Objective(Protocol):
    """What the loop minimises: the sum of ``loss`` over a step's packs, divided by the sum of ``count``."""

    tells: tuple[str, ...]  # names of what else is told of a step, as means

    def count(self, pack: Pack) -> int: ...

    def look_ahead(
        self, dataset: Sequence[TokenizedExample], indices: Sequence[int], name: str, ask: Ask
    ) -> None:
        """Find out what the loss of all examples at ``indices`` together needs, before their first pack."""

    def loss(
        self, forward: PackForward, pack: Pack, name: str | None
    ) -> tuple[torch.Tensor, tuple[float, ...]]:
        """Return the summed loss of ``pack``, with a graph, and the sums behind ``tells``.

        ``name`` is the data set that the pack's examples are numbered in: "train" or "validation".
        """
        ...


class NextToken(Objective):
    """Supervised fine-tuning: the cross-entropy of the learnt tokens."""

    tells: tuple[str, ...] = ()

    def count(self, pack: Pack) -> int:
        return pack.num_learnt

    def loss(
        self, forward: PackForward, pack: Pack, name: str | None
    ) -> tuple[torch.Tensor, tuple[float, ...]]:
        return forward.summed_loss(pack, name), ()


NEXT_TOKEN = NextToken()
