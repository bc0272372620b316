"""BOFT's rotation, a block at a time.

    y = s * W (R x)     R orthogonal, of D blocks of H x H on its diagonal      Liu et al. 2023, arXiv 2311.06243

PEFT writes R out as a matrix [D H, D H] and multiplies matrices of that size three times, for every layer and every
pass. Here the inputs are cut into their D blocks and each is multiplied with its own H x H: T D H^2
multiplications for T tokens in place of 3 (D H)^3 + T (D H)^2. One butterfly factor only; PEFT has no more without
CUDA either.

PEFT's layers stay where they are, as in engine/linear.py; only ``forward`` of the instance is another, and it does what
the class does wherever the adapter is switched off, merged, one of several, or has more factors or dropout.
"""

from types import MethodType
from typing import Any

import torch
from torch import nn


def spare_boft_kernel() -> None:
    """Keep PEFT from building BOFT's CUDA kernel where there is no CUDA: it would try anew for every layer."""
    if not torch.cuda.is_available():
        from peft.tuners.boft import layer

        layer._FBD_CUDA = False


def rotate_by_blocks(model: nn.Module) -> int:
    """Give the BOFT layers of ``model`` the forward of this module; return how many there are."""
    from peft.tuners.boft.layer import Linear

    layers = [module for module in model.modules() if isinstance(module, Linear)]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def rotate_by_matrices(model: nn.Module) -> None:
    """Take :func:`rotate_by_blocks` back."""
    for module in model.modules():
        if rotates_by_blocks(module):
            del module.__dict__["forward"]


def rotates_by_blocks(module: nn.Module) -> bool:
    """Return whether ``module`` is a BOFT layer with the forward of this module."""
    return getattr(module.__dict__.get("forward"), "__func__", None) is _forward


def _forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if args or kwargs or not _is_plain(layer):
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    (name,) = layer.active_adapters
    num_blocks, size = layer.boft_R[name].shape[1:3]
    rotations = layer.cayley_batch(layer.boft_R[name][0]).to(x.dtype)  # [D, H, H]
    blocks = x.reshape(-1, num_blocks, size).transpose(0, 1)  # [D, T, H]
    rotated = torch.bmm(blocks, rotations).transpose(0, 1).reshape(x.shape)
    y, scale, bias = layer.base_layer(rotated), layer.boft_s[name].squeeze(-1), layer.base_layer.bias
    y = y * scale if bias is None else (y - bias) * scale + bias
    return y.to(x.dtype)  # type: ignore[no-any-return]


def _is_plain(layer: Any) -> bool:
    active = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(active) != 1 or active[0] not in layer.boft_R:
        return False
    return len(layer.boft_R[active[0]]) == 1 and isinstance(layer.boft_dropout[active[0]], nn.Identity)
