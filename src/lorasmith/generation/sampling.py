"""How the next token is chosen, in OpenAI's words."""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from lorasmith.errors import SettingsError


def _as_tuple(stop: object) -> object:
    return (stop,) if isinstance(stop, str) else stop


def _check_not_empty(stop: tuple[str, ...]) -> tuple[str, ...]:
    if "" in stop:
        raise ValueError("a stop string is empty; every answer would stop before its first character")
    return stop


class SamplingSettings(BaseModel):
    """How one answer is decoded. The default is greedy: the same question gets the same answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(
        default=0.0, ge=0, le=2, description="0 takes the likeliest token; 1 samples as learnt"
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="sample among the likeliest tokens of this mass"
    )
    max_tokens: int = Field(default=256, ge=1, description="longest answer, in tokens")
    stop: Annotated[tuple[str, ...], BeforeValidator(_as_tuple), AfterValidator(_check_not_empty)] = Field(
        default=(), description="strings that end the answer and are not part of it"
    )
    seed: int | None = Field(
        default=None, ge=0, lt=2**63, description="repeats a sampled answer; none: new each time"
    )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


def parse_sampling(**values: object) -> SamplingSettings:
    """Return the settings, or raise SettingsError that names every wrong value in words.

    A value of None means "not given" and keeps the default.
    """
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return SamplingSettings.model_validate(given)
    except ValidationError as error:
        faults = [
            f"{'.'.join(map(str, fault['loc']))}={fault['input']!r}: {fault['msg']}"
            for fault in error.errors(include_url=False)
        ]
        raise SettingsError("The sampling settings are wrong:\n  " + "\n  ".join(faults)) from error


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
