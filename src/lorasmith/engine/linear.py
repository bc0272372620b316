"""LoRA on a linear layer, forward and backward without the detours.

    y = W x + s * B (A x)                  Hu et al. 2021, arXiv 2106.09685, section 4.1

PEFT casts x to the adapter's float32, lets autograd keep x once for W and once for A, and makes a new tensor
for every sum. Here one autograd function keeps x once, works in the base's number format (A and B stay float32
where the optimizer sees them), and adds the low-rank part into the base's product by the product itself::

    forward    h = x A^T                    y  = x W^T + s h B^T
    backward   e = s g B                    dx = g W + e A       dA = e^T x       dB = s g^T h

Projections that read the same x (q, k, v; gate, up) are computed together: x is kept once, their A are one
matrix, their dx one sum.

PEFT's layers stay where they are, with their parameters, so saving, loading and merging are PEFT's own; only
``forward`` of the instance is another. It does what the class does whenever the adapter is switched off, merged,
one of several, or of another kind.

Shape letters: T tokens, D input size, O output size, R rank, P projections that read one input.
"""

from typing import Any, Literal

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lorasmith.model.boft import rotates_by_blocks
from lorasmith.model.device import measure_cpu

_Layer = Any  # PEFT's LoRA on a linear layer: a LoraLayer and a Module at once, which its types do not say

# Names under one parent module that read the same input, the one that is called first in front.
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def speed_up_lora(model: nn.Module, product_dtype: torch.dtype | None = None) -> int:
    """Give the LoRA layers of ``model`` the forward of this module; return how many there are.

    ``product_dtype`` is what matrix products are computed in, None for that of the activations: on a CPU without
    bfloat16 units, float32 products of bfloat16 weights are several times faster and round once less.
    """
    count = 0
    for parent in model.modules():
        children: dict[str, _Layer] = {name: c for name, c in parent.named_children() if _is_known(c)}
        for names in _SAME_INPUT:
            group = [children.pop(name) for name in names if name in children]
            if group:
                _SharedInput(group, product_dtype)
                count += len(group)
        for child in children.values():
            _SharedInput([child], product_dtype)
            count += 1
    return count


def count_unfused(model: nn.Module) -> int:
    """Return how many adapted layers are left to PEFT's own forward: all but plain LoRA's and BOFT's by blocks."""
    return sum(
        isinstance(module, BaseTunerLayer)
        and not (_is_known(module) and not module.lora_variant)
        and not rotates_by_blocks(module)
        for module in model.modules()
    )


def choose_product_dtype(device: torch.device, dtype: torch.dtype) -> Literal["float32", "same"]:
    """Return what a base of ``dtype`` on ``device`` is multiplied in fastest; measured once a process on a CPU."""
    if device.type != "cpu" or dtype is torch.float32:
        return "same"
    speeds = measure_cpu()
    return "float32" if speeds.float32 > speeds.bfloat16 else "same"


def restore_lora(model: nn.Module) -> None:
    """Take :func:`speed_up_lora` back."""
    for module in model.modules():
        if _is_known(module):
            module.__dict__.pop("forward", None)


class _SharedInput:
    """LoRA layers that read the same input: the first one called computes all, the others find their result.

    That the input is the same is checked by identity at every call. A layer that turns out to read another
    input is computed by itself from then on.
    """

    def __init__(self, layers: list[_Layer], product_dtype: torch.dtype | None) -> None:
        self._layers = layers
        self._product_dtype = product_dtype
        self._together = len(layers) > 1
        self._input: torch.Tensor | None = None
        self._results: dict[int, torch.Tensor] = {}
        for place, layer in enumerate(layers):
            layer.forward = self._forward_of(place)

    def _forward_of(self, place: int) -> Any:
        layer = self._layers[place]

        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if args or kwargs or not _is_plain(layer):
                return type(layer).forward(layer, x, *args, **kwargs)
            if not _is_fusible(layer):
                return self._beside(layer, x)
            if not self._together:
                return self._compute([layer], x)[0]
            if place in self._results and x is self._input:
                result = self._results.pop(place)
                if not self._results:
                    self._input = None
                return result
            if place > 0 or not all(_is_plain(other) and _is_fusible(other) for other in self._layers):
                self._together = False
                return self._compute([layer], x)[0]
            first, *others = self._compute(self._layers, x)
            self._input, self._results = x, dict(enumerate(others, start=1))
            return first

        return forward

    def _compute(self, layers: list[_Layer], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tensors, scalings = [], []
        for layer in layers:
            (name,) = layer.active_adapters
            base = layer.base_layer
            tensors += [base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight]
            scalings.append(layer.scaling[name])
        return _LoraProjections.apply(x, self._product_dtype or x.dtype, scalings, *tensors)  # type: ignore[no-any-return]

    def _beside(self, layer: _Layer, x: torch.Tensor) -> torch.Tensor:
        """Return the base layer's own product, whatever it is made of, with the low-rank part added into it."""
        (name,) = layer.active_adapters
        base = layer.base_layer(x)
        lora_a, lora_b = layer.lora_A[name].weight, layer.lora_B[name].weight
        dropped = layer.lora_dropout[name](x)
        return _LowRankInto.apply(base, dropped, lora_a, lora_b, layer.scaling[name])  # type: ignore[no-any-return]


def _is_known(module: nn.Module) -> bool:
    """Return whether ``module`` is PEFT's LoRA on a linear layer, ordinary or quantised by bitsandbytes."""
    return isinstance(module, LoraLayer) and type(module).__name__ in ("Linear", "Linear8bitLt", "Linear4bit")


def _is_plain(layer: _Layer) -> bool:
    """Return whether ``layer`` computes W x + s B A x now, with one adapter of the common kind."""
    active = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(active) != 1 or active[0] not in layer.lora_A:
        return False
    name = active[0]
    return name not in layer.lora_variant and layer.lora_B[name].bias is None


def _is_fusible(layer: _Layer) -> bool:
    """Return whether W is an ordinary frozen matrix, and x goes to A as it is."""
    base = layer.base_layer
    dropout = layer.lora_dropout[layer.active_adapters[0]]
    no_dropout = isinstance(dropout, nn.Identity) or not layer.training
    return type(base) is nn.Linear and no_dropout and not any(p.requires_grad for p in base.parameters())


class _LoraProjections(torch.autograd.Function):
    """P projections of one input; for each come weight [O, D], bias [O] or None, A [R, D] and B [O, R], float32."""

    @staticmethod
    def forward(ctx: Any, x, product_dtype, scalings, *tensors):
        weights, biases, lora_as, lora_bs = (tensors[i::4] for i in range(4))
        rows = x.reshape(-1, x.shape[-1]).to(product_dtype)
        low = rows @ torch.cat(lora_as).to(product_dtype).T  # [T, sum of R]
        outputs = []
        parts = low.split([a.shape[0] for a in lora_as], dim=1)
        for weight, bias, lora_b, part, scaling in zip(
            weights, biases, lora_bs, parts, scalings, strict=True
        ):
            frozen = weight.to(product_dtype)
            y = rows @ frozen.T if bias is None else torch.addmm(bias.to(product_dtype), rows, frozen.T)
            y.addmm_(part, lora_b.to(product_dtype).T, alpha=scaling)
            outputs.append(y.to(x.dtype).view(*x.shape[:-1], weight.shape[0]))
        ctx.save_for_backward(x, low, *weights, *lora_as, *lora_bs)
        ctx.product_dtype, ctx.scalings = product_dtype, scalings
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *upstream):
        x, low, *saved = ctx.saved_tensors
        num = len(ctx.scalings)
        weights, lora_as, lora_bs = saved[:num], saved[num : 2 * num], saved[2 * num :]
        dtype = ctx.product_dtype
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        ranks = [a.shape[0] for a in lora_as]
        dx = None
        d_low = torch.empty_like(low)
        d_bs = []
        for place, (gradient, lora_b, part, d_part) in enumerate(
            zip(upstream, lora_bs, low.split(ranks, dim=1), d_low.split(ranks, dim=1), strict=True)
        ):
            g = gradient.reshape(-1, gradient.shape[-1]).to(dtype)
            d_part.copy_(g @ lora_b.to(dtype)).mul_(ctx.scalings[place])
            d_bs.append((part.T @ g).T.to(lora_b.dtype) * ctx.scalings[place])
            if ctx.needs_input_grad[0]:
                frozen = weights[place].to(dtype)
                dx = g @ frozen if dx is None else dx.addmm_(g, frozen)
        d_as = (d_low.T @ rows).to(lora_as[0].dtype).split(ranks)
        if dx is not None:
            dx = dx.addmm_(d_low, torch.cat(lora_as).to(dtype)).to(x.dtype).view(x.shape)
        of_tensors = [g for d_a, d_b in zip(d_as, d_bs, strict=True) for g in (None, None, d_a, d_b)]
        return dx, None, None, *of_tensors


class _LowRankInto(torch.autograd.Function):
    """Add s B A x into ``base`` [..., O], in place."""

    @staticmethod
    def forward(ctx: Any, base, x, lora_a, lora_b, scaling):
        rows = x.reshape(-1, x.shape[-1])
        low = rows @ lora_a.to(x.dtype).T
        flat = base.view(-1, base.shape[-1])
        flat.addmm_(low.to(base.dtype), lora_b.to(base.dtype).T, alpha=scaling)
        ctx.mark_dirty(base)
        ctx.save_for_backward(x, low, lora_a, lora_b)
        ctx.scaling = scaling
        return base

    @staticmethod
    def backward(ctx: Any, upstream):
        x, low, lora_a, lora_b = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        g = upstream.reshape(-1, upstream.shape[-1]).to(x.dtype)
        d_low = (g @ lora_b.to(x.dtype)) * ctx.scaling
        d_a = (d_low.T @ rows).to(lora_a.dtype)
        d_b = (g.T @ low).to(lora_b.dtype) * ctx.scaling
        dx = (d_low @ lora_a.to(x.dtype)).view(x.shape) if ctx.needs_input_grad[1] else None
        return upstream, dx, d_a, d_b, None
