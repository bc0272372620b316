"""Compute the layers below the first adapted one once, not once an epoch.

When an adapter trains only the upper layers of a model (``layers_to_transform``), the hidden states that enter
the first adapted layer never change: no weight below it does. They are computed once for every example and
kept, and each training step starts from them::

    embeddings - layer 0 .. cut-1      |  layer cut .. L-1 - norm - head
    frozen: once per example, kept     |  adapted: every step, forward and backward

The kept states are computed in the order of the data set, whatever the training order is, so that a resumed
run gets the very same bits.

Shape letters: T tokens of a pack, A kept tokens of all examples, D hidden size.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn

from lorasmith.data.tokens import TokenizedExample
from lorasmith.packing.trie import Pack, pack_examples


def first_adapted_layer(decoder: nn.Module) -> int:
    """Return how many of ``decoder.layers`` stand below everything that is trained; 0 if the embeddings train."""
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return 0
    inside = {id(parameter) for parameter in layers.parameters()}
    outside = [p for name, p in decoder.named_parameters() if id(p) not in inside and "norm" not in name]
    if any(parameter.requires_grad for parameter in outside):
        return 0
    for index, layer in enumerate(layers):
        if any(parameter.requires_grad for parameter in layer.parameters()):
            return index
    return len(layers)


class FrozenStates:
    """The hidden states that enter layer ``cut``, for every token of a data set; [A, D] in the compute dtype."""

    def __init__(self, states: torch.Tensor, starts: np.ndarray) -> None:
        self._states = states
        self._starts = starts

    def of(self, pack: Pack) -> torch.Tensor:
        """Return the states [1, T, D] of the pack's tokens."""
        rows = torch.from_numpy(self._starts[pack.owners] + pack.position_ids)
        return self._states.index_select(0, rows.to(self._states.device))[None]


def num_bytes(dataset: Sequence[TokenizedExample], hidden_size: int, dtype: torch.dtype) -> int:
    """Return the memory that the kept states of ``dataset`` take."""
    return sum(len(example.input_ids) - 1 for example in dataset) * hidden_size * dtype.itemsize


@torch.no_grad()
def compute_frozen_states(
    dataset: Sequence[TokenizedExample],
    lower_forward: Callable[[Pack], torch.Tensor],
    *,
    max_tokens: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> FrozenStates:
    """Run ``lower_forward`` (Pack -> [1, T, D]) over ``dataset`` in its own order and keep every state."""
    lengths = np.array([len(example.input_ids) - 1 for example in dataset], np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    states: torch.Tensor | None = None
    for low in range(0, len(dataset), 64):
        indices = range(low, min(low + 64, len(dataset)))
        for pack in pack_examples(dataset, indices, max_tokens=max_tokens):
            hidden = lower_forward(pack)[0]
            if states is None:
                states = torch.empty(
                    int(lengths.sum()), hidden.shape[1], dtype=hidden.dtype, device=hidden.device
                )
            for place, example in enumerate(pack.examples):
                tokens = torch.from_numpy(pack.tokens_of(place)).to(hidden.device)
                states[starts[example] : starts[example] + lengths[example]] = hidden[tokens]
        if on_progress is not None:
            on_progress(indices.stop, len(dataset))
    assert states is not None, "a data set to train on is never empty"
    return FrozenStates(states, starts)


@contextlib.contextmanager
def only_layers(decoder: nn.Module, part: slice, *, keep_norm: bool) -> Iterator[None]:
    """Let ``decoder`` consist of ``layers[part]`` for a while, without its last norm unless ``keep_norm``.

    Its hidden states then go in by ``inputs_embeds`` and come out as ``last_hidden_state``.
    """
    layers = decoder.layers
    norm_name = next(name for name in ("norm", "final_layer_norm") if hasattr(decoder, name))
    norm = getattr(decoder, norm_name)
    decoder.layers = layers[part]  # type: ignore[index]
    if not keep_norm:
        setattr(decoder, norm_name, nn.Identity())
    try:
        yield
    finally:
        decoder.layers = layers
        setattr(decoder, norm_name, norm)
