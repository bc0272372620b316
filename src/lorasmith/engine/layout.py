"""What every attention backend is given, and gives: the border between attention.py and the backends."""

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Scores:
    """How a model turns the products of queries and keys into shares, as transformers passes it on."""

    scaling: float
    sliding_window: int | None = None  # tokens that are seen, the token itself among them
    softcap: float | None = None  # scores are bounded by tanh, as in Gemma 2
    dropout: float = 0.0  # of shares; 0 where the model does not train


class PackLayout(Protocol):
    """What each token of one pack sees, in the form that one backend computes with; made once a pack."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        """Return [1, T, H, K] for ``query`` [1, H, T, K], ``key`` and ``value`` [1, G, T, K].

        T tokens of the pack, H query heads, G key heads, K head size.
        """
        ...
