"""What a tuning method wants of the optimizer and of each step, beside the gradient of the loss.

lora_plus   B learns faster than A: two groups of parameters
adalora     a penalty that keeps A and B orthogonal, and after each step ranks taken from one layer for another
"""

from typing import Any

import torch
from peft import AdaLoraModel, PeftModel
from transformers import PreTrainedModel

from lorasmith.model.method_settings import LoraPlusSettings, MethodSettings

_SCORES = ("exp_avg_ipt", "exp_avg_unc")  # of PEFT's RankAllocator: how much each number was needed so far


def group_parameters(
    model: PeftModel | PreTrainedModel, method: MethodSettings | None
) -> list[dict[str, Any]]:
    """Return the optimizer's groups: ``params``, and ``rate_multiple`` of the run's learning rate."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not isinstance(method, LoraPlusSettings):
        return [{"params": [p for _, p in trained], "rate_multiple": 1.0}]
    return [
        {"params": [p for name, p in trained if ".lora_B." not in name], "rate_multiple": 1.0},
        {
            "params": [p for name, p in trained if ".lora_B." in name],
            "rate_multiple": method.loraplus_lr_ratio,
        },
    ]


def penalty(model: PeftModel | PreTrainedModel) -> torch.Tensor | None:
    """Return what is added to a step's mean loss: orth_reg_weight * mean ||P P' - I|| of AdaLoRA, over A and B'."""
    ranks = _ranks_of(model)
    if ranks is None:
        return None
    config: Any = ranks.peft_config[ranks.trainable_adapter_name]
    terms = []
    for name, p in ranks.model.named_parameters():
        if p.requires_grad and ("lora_A" in name or "lora_B" in name):
            product = p @ p.T if "lora_A" in name else p.T @ p
            terms.append(torch.linalg.norm(product - torch.eye(len(product), device=product.device)))
    return config.orth_reg_weight * torch.stack(terms).mean()


def after_step(model: PeftModel | PreTrainedModel, step: int) -> None:
    """Give and take AdaLoRA's ranks after optimizer step ``step`` (from 0), while its gradients are there."""
    if (ranks := _ranks_of(model)) is not None:
        ranks.update_and_allocate(step)


def method_state(model: PeftModel | PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return what a method knows beside its weights, by name; for a checkpoint."""
    ranks = _ranks_of(model)
    if ranks is None:
        return {}
    kept = {name: getattr(ranks.rankallocator, name) for name in _SCORES}
    return {f"{name}.{key}": tensor for name, scores in kept.items() for key, tensor in scores.items()}


def restore_method_state(
    model: PeftModel | PreTrainedModel, saved: dict[str, torch.Tensor], adapter_config: dict[str, Any]
) -> None:
    """Put back what :func:`method_state` gave; which ranks were taken stands in the saved adapter's config."""
    ranks = _ranks_of(model)
    if ranks is None:
        return
    for name in _SCORES:
        begin = f"{name}."
        scores = {key.removeprefix(begin): value for key, value in saved.items() if key.startswith(begin)}
        setattr(ranks.rankallocator, name, scores)
        ranks.rankallocator.ipt = {key: torch.zeros_like(value) for key, value in scores.items()}
    config: Any = ranks.peft_config[ranks.trainable_adapter_name]
    config.rank_pattern = adapter_config.get("rank_pattern")


def _ranks_of(model: PeftModel | PreTrainedModel) -> AdaLoraModel | None:
    inner = model.base_model if isinstance(model, PeftModel) else None
    return inner if isinstance(inner, AdaLoraModel) else None
