"""Logits -> the next token of each row."""

from collections.abc import Sequence

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from lorasmith.generation.sampling import SamplingSettings


class Sampler:
    """Chooses next tokens by ``SamplingSettings``. Shapes: B rows, V vocabulary."""

    def __init__(self, settings: SamplingSettings) -> None:
        self._settings = settings
        self._warpers = LogitsProcessorList()
        if not settings.is_greedy:
            self._warpers.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_p < 1:
                self._warpers.append(TopPLogitsWarper(settings.top_p))

    def new_dice(self) -> torch.Generator:
        """Return the source of randomness of one answer.

        Every answer has its own, so that an answer does not depend on which others share its batch. It lives
        on the CPU, so that a seed does not depend on the device.
        """
        dice = torch.Generator()
        if self._settings.seed is None:
            dice.seed()
        else:
            dice.manual_seed(self._settings.seed)
        return dice

    def choose(self, logits: torch.Tensor, dice: Sequence[torch.Generator]) -> list[int]:
        """Return the next token id of each row of ``logits`` [B, V] (float32), with one generator a row."""
        if self._settings.is_greedy:
            return logits.argmax(dim=-1).tolist()
        no_history = torch.LongTensor(len(logits), 0)  # these warpers look at the scores alone
        probabilities = self._warpers(no_history, logits.cpu()).softmax(dim=-1)
        return [
            int(torch.multinomial(row, 1, generator=own))
            for row, own in zip(probabilities, dice, strict=True)
        ]
