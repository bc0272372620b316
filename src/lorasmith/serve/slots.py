"""Keys and values of all running rows, one block of memory a layer, written in place.

A column is a position: the keys of a row's token p stand in column p, whatever the other rows do. So rows join
and leave without moving anybody's keys, and no row is padded to another's length.

    slot 0   k k k k k . . . s        s, the last column, takes what padding writes; nobody looks at it
    slot 1   k k k . . . . . s
    slot 2   k k k k . . . . s

Shapes: S slots, B rows of a forward, T tokens read at once, C columns, G key heads, K head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from lorasmith.errors import BaseModelError

COLUMNS_AT_ONCE = 256  # columns are added by so many, so that growing is rare

Kept = list[tuple[torch.Tensor, torch.Tensor] | None]  # a row's keys and values [G, T, K], layer by layer


@dataclass(frozen=True)
class Place:
    """Where a forward's tokens go: slots ``first`` to ``first + B``, ``columns`` [B, T]; it sees ``width`` columns."""

    first: int
    columns: torch.Tensor
    width: int


class _SlotLayer(CacheLayerMixin):
    """One layer's block [S, G, C, K]; made when the first keys come and their shape is known."""

    def __init__(self, owner: "SlotCache") -> None:
        super().__init__()
        self._owner = owner

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        place = self._owner.place
        last = place.first + len(place.columns)
        rows = torch.arange(place.first, last, device=place.columns.device)[:, None]
        self.keys[rows, :, place.columns] = key_states.transpose(1, 2)
        self.values[rows, :, place.columns] = value_states.transpose(1, 2)
        seen = slice(place.first, last), slice(None), slice(place.width)
        return self.keys[seen], self.values[seen]

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = (self._new_block(states) for states in (key_states, value_states))
        self.is_initialized = True

    def resize(self) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = (self._copy_block(block) for block in (self.keys, self.values))

    def _new_block(self, like: torch.Tensor) -> torch.Tensor:
        # Zeros, since a masked column counts 0 times its value, and 0 times NaN is NaN.
        shape = (self._owner.num_slots, like.shape[1], self._owner.num_columns, like.shape[3])
        return torch.zeros(shape, dtype=like.dtype, device=like.device)

    def _copy_block(self, old: torch.Tensor) -> torch.Tensor:
        block = self._new_block(old)
        slots, columns = min(len(old), len(block)), min(old.shape[2], block.shape[2])
        block[:slots, :, :columns] = old[:slots, :, :columns]
        return block

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._owner.place.width, 0

    def get_seq_length(self) -> int:
        return self._owner.place.width

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """The cache of a model whose rows come and go. Set ``place`` before each forward."""

    def __init__(self, num_layers: int, *, max_slots: int, max_tokens: int) -> None:
        self._max_slots, self._max_tokens = max_slots, max_tokens  # tokens: of all slots together
        self.num_slots = self.num_columns = 0
        self.place = Place(0, torch.zeros(0, 0, dtype=torch.long), 0)
        self._slots = [_SlotLayer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self._slots))

    @torch.inference_mode()
    def make_room(self, num_rows: int, num_columns: int) -> None:
        """Make room for so many rows of so many tokens, the rows there are among them."""
        num_columns += 1  # the last one is nobody's
        by_many = -(-num_columns // COLUMNS_AT_ONCE) * COLUMNS_AT_ONCE
        num_columns = max(num_columns, min(by_many, self._max_tokens // num_rows))
        if num_rows <= self.num_slots and num_columns <= self.num_columns:
            return
        slots, columns = max(num_rows, self.num_slots), max(num_columns, self.num_columns)
        if slots * columns > self._max_tokens:  # many slots from before, or long ones: not both
            slots, columns = num_rows, num_columns
        elif num_rows > self.num_slots:  # more will come
            slots = max(slots, min(2 * slots, self._max_slots, self._max_tokens // columns))
        self.num_slots, self.num_columns = slots, columns
        for layer in self._slots:
            layer.resize()

    def release(self) -> None:
        """Give all memory back; no row may be running."""
        self.num_slots = self.num_columns = 0
        for layer in self._slots:
            layer.keys = layer.values = None
            layer.is_initialized = False

    @torch.inference_mode()
    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first tokens of one slot into another."""
        for layer in self._slots:
            for block in (layer.keys, layer.values):
                if block is not None:
                    block[target, :, :num_tokens] = block[source, :, :num_tokens]

    @torch.inference_mode()
    def take(self, slot: int, num_tokens: int) -> Kept:
        """Return a copy of a slot's first tokens."""
        return [
            None
            if layer.keys is None or layer.values is None
            else (layer.keys[slot, :, :num_tokens].clone(), layer.values[slot, :, :num_tokens].clone())
            for layer in self._slots
        ]

    @torch.inference_mode()
    def put(self, slot: int, kept: Kept, num_tokens: int) -> None:
        """Write the first tokens of what ``take`` returned into a slot."""
        for layer, pair in zip(self._slots, kept, strict=True):
            if pair is None:
                continue
            if layer.keys is None:
                layer.lazy_initialization(pair[0][None], pair[1][None])
            assert layer.keys is not None
            assert layer.values is not None
            for block, states in zip((layer.keys, layer.values), pair, strict=True):
                block[slot, :, :num_tokens] = states[:, :num_tokens]


class SlotMasks:
    """What each token may look at: [B, 1, T, C] of booleans; a dict of them where a model mixes kinds of layers."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Learn the model's kinds of layers.

        Raises:
            BaseModelError: one of them does not keep a key for every token.
        """
        config = model.config.get_text_config(decoder=True)
        window = getattr(config, "sliding_window", None)
        plain = "full_attention" if window is None else "sliding_attention"
        kinds = tuple(dict.fromkeys(getattr(config, "layer_types", None) or (plain,)))
        unknown = set(kinds) - {"full_attention", "sliding_attention"}
        if unknown or not getattr(model, "_supports_attention_backend", False):
            why = f"layers of the kind {', '.join(sorted(unknown))}" if unknown else "attention of its own"
            raise BaseModelError(
                f"{config.model_type} has {why}, and lorasmith serves models whose layers all keep the keys of every "
                "token. Ask it with lorasmith ask, or serve it with another program: lorasmith serve --engine vllm."
            )
        self._windows = {kind: window if kind == "sliding_attention" else None for kind in kinds}

    def of(self, positions: torch.Tensor, width: int) -> "torch.Tensor | dict[str, torch.Tensor]":
        """Return the masks of queries at ``positions`` [B, T] over the first ``width`` columns."""
        columns = torch.arange(width, device=positions.device)
        distance = positions[:, None, :, None] - columns
        masks = {
            kind: distance >= 0 if window is None else (distance >= 0) & (distance < window)
            for kind, window in self._windows.items()
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))


def count_layers(model: PreTrainedModel) -> int:
    """Return how many layers keep keys and values."""
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def left_pad(rows: Sequence[Sequence[int]], width: int, filler: int) -> torch.Tensor:
    """Return [B, width] with each row at the right end."""
    return torch.tensor([[filler] * (width - len(row)) + list(row) for row in rows])
