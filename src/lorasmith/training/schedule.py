"""The learning rate of each step, and which examples each step takes: pure functions of settings and step.

Nothing here has a state, so a resumed run needs only its step number.
"""

import math

import numpy as np

from lorasmith.training.settings import TrainingSettings

_FULL_FINETUNING_RATE = 5e-5
_LORA_MULTIPLE = 10.0
_REFERENCE_HIDDEN_SIZE = 2000
_EXPONENT = {"qwen2": 0.0775, "qwen3": 0.0775}
_USUAL_EXPONENT = 0.781  # fitted on Llama models


def suggest_learning_rate(model_type: str, hidden_size: int) -> float:
    """Return 5e-5 * 10 * (2000 / hidden_size)^p, the fit of "LoRA Without Regret" over model sizes.

    Source: Schulman et al. 2025 and the tinker cookbook's ``get_lr``; p is 0.781 for Llama, 0.0775 for Qwen.
    SmolLM2-135M (hidden size 576) gets 1.3e-3, an 8B Llama (4096) 2.9e-4.
    """
    exponent = _EXPONENT.get(model_type, _USUAL_EXPONENT)
    return _FULL_FINETUNING_RATE * _LORA_MULTIPLE * (_REFERENCE_HIDDEN_SIZE / hidden_size) ** exponent


def learning_rate_at(step: int, num_steps: int, settings: TrainingSettings, highest: float) -> float:
    """Return the learning rate of step ``step`` (0-based) of ``num_steps``.

    Without warm-up it equals transformers' cosine and linear schedules. The warm-up starts at
    ``highest / (warmup + 1)`` and not at 0: a step at rate 0 teaches nothing.
    """
    warmup = settings.num_warmup_steps(num_steps)
    if step < warmup:
        return highest * (step + 1) / (warmup + 1)
    if settings.lr_schedule == "constant":
        return highest
    done = (step - warmup) / max(1, num_steps - warmup)
    if settings.lr_schedule == "linear":
        return highest * (1 - done)
    return highest * 0.5 * (1 + math.cos(math.pi * done))


def examples_of_step(step: int, num_examples: int, settings: TrainingSettings) -> list[int]:
    """Return the indices of the examples of step ``step`` (0-based); every epoch is a new seeded order."""
    per_epoch = settings.steps_per_epoch(num_examples)
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([settings.seed, epoch]).permutation(num_examples)
    return order[place * settings.batch_size : (place + 1) * settings.batch_size].tolist()


def split_for_validation(num_examples: int, settings: TrainingSettings) -> tuple[list[int], list[int]]:
    """Return the indices to train on and the held-out ones, both in the data's order; seeded."""
    num_held_out = max(1, round(settings.validation_share * num_examples)) if settings.validation_share else 0
    order = np.random.default_rng([settings.seed, 0x5EED]).permutation(num_examples)
    held_out = set(order[:num_held_out].tolist())
    return [i for i in range(num_examples) if i not in held_out], sorted(held_out)
