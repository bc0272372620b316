"""What a user may say about how an answer is chosen, in OpenAI's words. Needs no torch."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

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
        default=0.0, ge=0, le=2, description="0 takes the likeliest token; 1 samples as learnt."
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Sample among the likeliest tokens of this mass."
    )
    max_tokens: int = Field(default=256, ge=1, description="Longest answer, in tokens.")
    stop: Annotated[tuple[str, ...], BeforeValidator(_as_tuple), AfterValidator(_check_not_empty)] = Field(
        default=(), description="Strings that end the answer and are not part of it."
    )
    seed: int | None = Field(
        default=None, ge=0, lt=2**63, description="Repeats a sampled answer; none: another each time."
    )

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


class SamplingError(SettingsError):
    """Raised for wrong sampling settings; ``names`` are theirs."""

    def __init__(self, message: str, names: tuple[str, ...]) -> None:
        super().__init__(message)
        self.names = names


def parse_sampling(**values: object) -> SamplingSettings:
    """Return the settings, or raise SamplingError that names every wrong value in words.

    A value of None means "not given" and keeps the default.
    """
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return SamplingSettings.model_validate(given)
    except ValidationError as error:
        wrong = error.errors(include_url=False)
        faults = [_describe_fault(fault) for fault in wrong]
        raise SamplingError(
            "The sampling settings are wrong:\n  " + "\n  ".join(faults),
            tuple(str(fault["loc"][0]) for fault in wrong),
        ) from error


def _describe_fault(fault: ErrorDetails) -> str:
    name = ".".join(map(str, fault["loc"]))
    return f"{name}={fault['input']!r}: {fault['msg'].removeprefix('Value error, ')}"
