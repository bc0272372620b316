"""Keys and values of finished rows, for later ones that begin alike: a template, a system prompt, a conversation."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from lorasmith.generation.decode import MIN_SHARED_TOKENS, count_shared
from lorasmith.serve.slots import Kept


@dataclass(frozen=True, eq=False)
class Beginning:
    """Tokens as one adapter read them. Another adapter's keys of the same tokens are other keys."""

    adapter: Hashable
    token_ids: tuple[int, ...]
    kept: Kept


class Beginnings:
    """At most ``max_tokens`` tokens of them; the one unused for longest goes first."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._kept: list[Beginning] = []  # the last used at the end
        self.num_tokens = 0

    def add(self, beginning: Beginning) -> None:
        """Keep one, in the place of those that it begins with."""
        if len(beginning.token_ids) > self._max_tokens:
            return
        for old in self._kept:
            if (
                old.adapter == beginning.adapter
                and beginning.token_ids[: len(old.token_ids)] == old.token_ids
            ):
                self._remove(old)
                break
        self._kept.append(beginning)
        self.num_tokens += len(beginning.token_ids)
        while self.num_tokens > self._max_tokens:
            self._remove(self._kept[0])

    def find(self, adapter: Hashable, token_ids: Sequence[int]) -> tuple[Beginning, int] | None:
        """Return the one that shares most of the beginning, and how many tokens; one token is left to be read."""
        best, most = None, MIN_SHARED_TOKENS - 1
        for beginning in self._kept:
            if beginning.adapter == adapter:
                shared = count_usable(beginning.token_ids, token_ids)
                if shared > most:
                    best, most = beginning, shared
        if best is None:
            return None
        self._kept.remove(best)
        self._kept.append(best)
        return best, most

    def forget(self, adapter: Hashable) -> None:
        """Drop all of an adapter's."""
        for beginning in [kept for kept in self._kept if kept.adapter == adapter]:
            self._remove(beginning)

    def _remove(self, beginning: Beginning) -> None:
        self._kept.remove(beginning)
        self.num_tokens -= len(beginning.token_ids)


def count_usable(held: Sequence[int], token_ids: Sequence[int]) -> int:
    """Return how many of ``token_ids`` need not be read where ``held`` has been; the last one always must."""
    return min(count_shared([held, token_ids]), len(token_ids) - 1)
