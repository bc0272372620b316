"""Cross-entropy on the learnt positions only, in chunks.

The output head is the largest matrix of a small model (49,152 x 576 for SmolLM2), and its logits the largest
tensor of a step. A learnt position needs one row of them, once: each chunk's logits are made, turned into the
gradient of the hidden states, and thrown away. Nothing of size [N, V] outlives its chunk.

Shape letters: N predictions, D hidden size, V vocabulary.
"""

from typing import Any

import torch

# Float32 logits held at a time. On a CPU, larger ones leave the caches and page-fault; a GPU wants long products.
_CHUNK_BYTES, _CHUNK_BYTES_OF_GPU = 32 * 2**20, 512 * 2**20


def cross_entropies(
    hidden: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    product_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return ``cross_entropy(head @ hidden[n], targets[n])`` for every n, float32 [N].

    ``hidden`` [N, D] in the compute dtype, ``head`` [V, D] and ``bias`` [V] frozen, ``targets`` int64 [N].
    The gradient of ``hidden`` is made in the forward pass, while the logits are there: row n of it depends on
    prediction n alone, so the backward pass only multiplies it by what comes from above.
    ``product_dtype`` is what matrix products are computed in, None for that of ``hidden``.
    """
    if head.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("the output head must be frozen: its gradient is not computed here")
    return _CrossEntropies.apply(hidden, head, bias, targets, product_dtype or hidden.dtype)  # type: ignore[no-any-return]


class _CrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, head, bias, targets, product_dtype):
        chunk_bytes = _CHUNK_BYTES_OF_GPU if hidden.is_cuda else _CHUNK_BYTES
        rows = max(1, chunk_bytes // (4 * head.shape[0]))
        losses = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wants_gradient else None
        factors, head = hidden.to(product_dtype), head.to(product_dtype)
        bias = None if bias is None else bias.to(product_dtype)
        for start in range(0, len(targets), rows):
            part = slice(start, start + rows)
            logits = torch.nn.functional.linear(factors[part], head, bias).float()
            peak = logits.amax(dim=-1, keepdim=True)
            wanted = logits.gather(1, targets[part, None]).squeeze(1) - peak.squeeze(1)
            shares = logits.sub_(peak).exp_()
            norm = shares.sum(dim=-1, keepdim=True)
            losses[part] = norm.squeeze(1).log() - wanted
            if gradient is not None:  # d loss / d logits = softmax - one_hot(target)
                shares.div_(norm)
                shares.scatter_add_(1, targets[part, None], shares.new_full((len(wanted), 1), -1.0))
                gradient[part] = shares.to(head.dtype) @ head
        ctx.gradient = gradient
        return losses

    @staticmethod
    def backward(ctx: Any, upstream):
        gradient = ctx.gradient
        if gradient is not None:
            gradient = (gradient * upstream[:, None]).to(gradient.dtype)
        return gradient, None, None, None, None
