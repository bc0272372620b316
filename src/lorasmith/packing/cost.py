"""What a pack costs to compute, so that packs of one step come out alike."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class PackCost:
    """FLOP of a forward pass by what causes them; only their ratios matter.

    A token goes through the layers' matrices; a learnt token through the output head as well, which is the largest
    matrix of a small model; and a pair of tokens, one of which sees the other, is a product in every head.
    """

    per_token: float = 1.0
    per_learnt: float = 0.0
    per_pair: float = 0.0

    def in_tokens(self, begin: np.ndarray, end: np.ndarray, num_learnt: np.ndarray) -> np.ndarray:
        """Return the cost of computing tokens ``begin`` to ``end`` of examples, in tokens that see nothing; int64 [N].

        Token p of an example sees p + 1 tokens, so tokens 2 to 4 make 3 + 4 = 7 pairs.
        """
        pairs = (end * (end + 1) - begin * (begin + 1)) / 2
        flop = self.per_token * (end - begin) + self.per_learnt * num_learnt + self.per_pair * pairs
        return np.rint(flop / self.per_token).astype(np.int64)
