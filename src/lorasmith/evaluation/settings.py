"""What a run file may say about the report: section ``report``. Every threshold of the verdict stands here."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator


def _as_tuple(data: object) -> object:
    return (data,) if isinstance(data, str) else data


class ReportSettings(BaseModel):
    """What is asked after a run, and what the answers must be like.

    A ``ship_`` threshold must be kept for the verdict "ship"; a ``reject_`` threshold that is broken means "do not
    ship"; in between it is "look closer".
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    after_training: bool = Field(default=True, description="make the report when a run has ended")
    data: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] = Field(
        default=(),
        description="held-out data files, never trained on; none: data.validation or the validation share",
    )
    max_questions: int = Field(
        default=100, ge=1, description="most questions asked of each held-out file, evenly spread"
    )
    max_training_questions: int = Field(
        default=40, ge=0, description="training questions asked of the tuned model, to see what it learnt"
    )
    max_answer_tokens: int | Literal["auto"] = Field(
        default="auto", description="longest answer; auto: half as long again as the longest reference"
    )
    min_questions: int = Field(
        default=20, ge=1, description="fewer held-out questions than this are too few for the verdict ship"
    )
    significance: float = Field(
        default=0.05, gt=0, lt=1, description="chance at which a difference of two models counts as real"
    )
    min_rouge_l: float = Field(
        default=0.7,
        ge=0,
        le=1,
        description="without keywords, an answer is right from this ROUGE-L on, if it has the facts",
    )
    min_chrf: float = Field(default=60, ge=0, le=100, description="or from this chrF on, if it has the facts")
    reject_stopped: float = Field(
        default=0.95, ge=0, le=1, description="share of answers that must end by themselves"
    )
    ship_right: float = Field(default=0.8, ge=0, le=1, description="share of held-out answers that are right")
    reject_right: float = Field(
        default=0.5, ge=0, le=1, description="the share of right answers must not be surely below this"
    )
    ship_forgotten: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="share of the base's right general answers that may be lost, on balance",
    )
    reject_forgotten: float = Field(
        default=0.5, ge=0, le=1, description="more than this share lost is too much"
    )
    ship_perplexity: float = Field(
        default=1.25, ge=1, description="perplexity on general text, as a multiple of the base's"
    )
    reject_perplexity: float = Field(default=3.0, ge=1, description="above this multiple it is too much")

    @model_validator(mode="after")
    def _thresholds_are_in_order(self) -> "ReportSettings":
        for ship, reject in (
            ("reject_right", "ship_right"),
            ("ship_forgotten", "reject_forgotten"),
            ("ship_perplexity", "reject_perplexity"),
        ):
            if getattr(self, ship) > getattr(self, reject):
                raise ValueError(
                    f"{ship} is {getattr(self, ship)}, above {reject}, which is {getattr(self, reject)}"
                )
        return self
