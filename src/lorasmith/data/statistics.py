"""Numbers about many examples, for the screen and for --json."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_BIN_SIZES = [step * 10**power for power in range(7) for step in (1, 2, 5)]


@dataclass(frozen=True, slots=True)
class Bin:
    """``count`` values v with ``low <= v <= high``."""

    low: int
    high: int
    count: int


@dataclass(frozen=True, slots=True)
class Distribution:
    """How whole numbers are spread; ``percentile_95`` is not exceeded by 95% of them."""

    minimum: int
    median: int
    mean: float
    percentile_95: int
    maximum: int
    bins: tuple[Bin, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as ``lorasmith check --json`` prints them."""
        return asdict(self)


def describe(values: np.ndarray, *, max_bins: int = 12) -> Distribution:
    """Return the distribution of ``values`` (whole numbers, at least one), in bins of one round width."""
    low, high = int(values.min()), int(values.max())
    width = next(size for size in _BIN_SIZES if high // size - low // size < max_bins)
    first = low // width
    counts = np.bincount(values // width - first)
    bins = [
        Bin((first + i) * width, (first + i + 1) * width - 1, int(count)) for i, count in enumerate(counts)
    ]
    median, percentile_95 = np.quantile(values, [0.5, 0.95], method="inverted_cdf")
    return Distribution(low, int(median), float(values.mean()), int(percentile_95), high, tuple(bins))
