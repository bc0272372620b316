"""Counts with their uncertainty: what few questions can tell, and what they cannot."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

_Z_95 = 1.959963984540054  # the standard normal's 97.5% point

Outcome = Literal["better", "worse", "no difference", "too few to tell"]


@dataclass(frozen=True, slots=True)
class Count:
    """k of n."""

    k: int
    n: int

    @property
    def share(self) -> float:
        return self.k / self.n if self.n else 0.0

    def interval(self) -> tuple[float, float]:
        """Return Wilson's 95% interval of the share (Wilson 1927); (0, 1) where nothing was counted.

        Unlike k/n plus and minus two standard errors it stays inside 0 to 1, and 30 of 30 is not "surely 100%".
        """
        if self.n == 0:
            return 0.0, 1.0
        spread = _Z_95**2 / self.n
        middle = (self.share + spread / 2) / (1 + spread)
        half = math.sqrt(spread * self.share * (1 - self.share) + spread**2 / 4) / (1 + spread)
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        percent = round(100 * self.share)
        if 0 < self.k < self.n:  # 199 of 200 is not 100%
            percent = min(99, max(1, percent))
        return f"{self.k} of {self.n} ({percent}%)"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same questions asked of two models, counted by who was right."""

    both: int
    gained: int  # the second alone was right
    lost: int  # the first alone was right
    neither: int

    @classmethod
    def of(cls, first: Sequence[bool], second: Sequence[bool]) -> "Comparison":
        pairs = list(zip(first, second, strict=True))
        return cls(
            *(pairs.count(pair) for pair in ((True, True), (False, True), (True, False), (False, False)))
        )

    @property
    def p_value(self) -> float:
        """McNemar's exact two-sided test: the chance of so lopsided a split of the changed answers by luck alone."""
        changed, fewer = self.gained + self.lost, min(self.gained, self.lost)
        tail = sum(math.comb(changed, i) for i in range(fewer + 1))
        return min(1.0, 2 * tail / 2**changed)

    def outcome(self, significance: float) -> Outcome:
        """Say in which direction the second model differs, if the changed answers are enough to say it."""
        if self.p_value < significance:
            return "better" if self.gained > self.lost else "worse"
        return "too few to tell" if self.gained != self.lost else "no difference"
