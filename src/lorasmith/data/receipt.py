"""What became of every row: used + skipped + failed = rows read."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lorasmith.data.readers import split_place

_MAX_LISTED = 1000  # rows listed by file:line in receipt.json, of each kind; the counts are of all


@dataclass(frozen=True, slots=True)
class Receipt:
    """The account of one source. Counts are rows, blank lines among them.

    ``faults`` and ``skips`` are (file:line, reason) of single rows: of every failed one, and of the first
    1,000 that were skipped. ``truncated`` counts the used rows that were cut, ``warnings`` concern used rows.
    ``divided`` counts the used documents that were cut into pieces, ``pieces`` what all documents together gave.
    """

    source: str
    rows_read: int
    used: int
    skipped: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    faults: tuple[tuple[str, str], ...] = ()
    skips: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()
    divided: int = 0
    pieces: int = 0

    def __post_init__(self) -> None:
        accounted = self.used + self.num_skipped + self.num_failed
        if accounted != self.rows_read:
            raise ValueError(
                f"the receipt of {self.source} does not add up: {accounted} of {self.rows_read} rows"
            )

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped.values())

    @property
    def num_failed(self) -> int:
        return sum(self.failed.values())

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as written to receipt.json."""
        return {
            "source": self.source,
            "rows_read": self.rows_read,
            "used": self.used,
            "skipped": self.skipped,
            "failed": self.failed,
            "truncated": self.truncated,
            "faults": [list(fault) for fault in self.faults],
            "skips": [list(skip) for skip in self.skips],
            "warnings": list(self.warnings),
            "divided": self.divided,
            "pieces": self.pieces,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Receipt":
        """Make the receipt that :meth:`to_json` wrote."""
        pairs = {key: tuple((where, reason) for where, reason in values[key]) for key in ("faults", "skips")}
        return cls(**{**values, **pairs, "warnings": tuple(values["warnings"])})


class Ledger:
    """Counts rows while they are read; :meth:`close` gives the receipt.

    Every row is counted by :meth:`read`, and entered once as used, skipped or failed. A used row may later
    be taken back (it does not fit, the recipe refuses it) with ``was_used``. ``files`` gives the order in
    which faults are listed.
    """

    def __init__(self, source: str, files: Sequence[str], *, skips_faults: bool) -> None:
        self._source = source
        self._files = {name: number for number, name in enumerate(files)}
        self._skips_faults = skips_faults
        self._rows_read = 0
        self._used = 0
        self._truncated = self._divided = self._pieces = 0
        self._skipped: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._faults: list[tuple[str, str]] = []
        self._skips: list[tuple[str, str]] = []
        self._warnings: list[str] = []
        self._num_warnings: Counter[str] = Counter()

    def read(self) -> None:
        self._rows_read += 1

    def use(self) -> None:
        self._used += 1

    def skip(self, reason: str, where: str, detail: str = "", *, was_used: bool = False) -> None:
        """Enter a row that is left out and no error; ``reason`` is counted, ``detail`` is listed with the row."""
        self._used -= was_used
        self._skipped[reason] += 1
        if len(self._skips) < _MAX_LISTED:
            self._skips.append((where, _sentence(reason, detail)))

    def fail(self, reason: str, where: str, detail: str = "", *, was_used: bool = False) -> None:
        """Enter a row that is an error; under "on_bad_row: skip" it is a counted skip."""
        if self._skips_faults:
            self.skip(reason, where, detail, was_used=was_used)
            return
        self.refuse(reason, where, detail, was_used=was_used)

    def refuse(self, reason: str, where: str, detail: str = "", *, was_used: bool = False) -> None:
        """Enter a row that is an error whatever the policy for bad rows: it has a policy of its own."""
        self._used -= was_used
        self._failed[reason] += 1
        self._faults.append((where, _sentence(reason, detail)))

    def truncate(self) -> None:
        """Note that a used row was cut; it stays used."""
        self._truncated += 1

    def divide(self, num_divided: int, num_pieces: int) -> None:
        """Note how many of the used documents were cut into pieces, and the pieces of all of them."""
        self._divided, self._pieces = num_divided, num_pieces

    def warn(self, kind: str, text: str) -> None:
        self._num_warnings[kind] += 1
        if self._num_warnings[kind] <= _MAX_LISTED:
            self._warnings.append(text)

    def close(self) -> Receipt:
        unlisted = [
            f"{number - _MAX_LISTED} more rows: {kind}"
            for kind, number in self._num_warnings.items()
            if number > _MAX_LISTED
        ]
        return Receipt(
            source=self._source,
            rows_read=self._rows_read,
            used=self._used,
            skipped=dict(self._skipped.most_common()),
            failed=dict(self._failed.most_common()),
            truncated=self._truncated,
            faults=tuple(sorted(self._faults, key=self._order)),
            skips=tuple(sorted(self._skips, key=self._order)),
            warnings=(*self._warnings, *unlisted),
            divided=self._divided,
            pieces=self._pieces,
        )

    def _order(self, entry: tuple[str, str]) -> tuple[int, int]:
        name, number = split_place(entry[0])
        return self._files[name], abs(number)


def _sentence(reason: str, detail: str) -> str:
    return f"{reason}: {detail}" if detail else reason
