"""How the adapter is trained; section ``training`` of a run file."""

import math
import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lorasmith.data.settings import RowKind


class TrainingSettings(BaseModel):
    """A step is one optimizer step: ``batch_size`` examples, laid out in as many packs as memory asks for.

    The defaults follow "LoRA Without Regret" (Schulman et al., 2025): a learning rate about ten times that of
    full fine-tuning, and small batches.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    epochs: float = Field(default=3.0, gt=0, description="times that the training data is gone through")
    max_steps: int | None = Field(
        default=None, ge=1, description="stop after this many steps, whatever epochs says"
    )
    batch_size: int = Field(default=8, ge=1, description="examples (of preferences: pairs) in one step")
    group_prefix_tokens: int | None = Field(
        default=None,
        ge=1,
        description="put examples that begin with the same so many tokens (many questions about one document) into "
        "the same steps, where the prefix is computed once; none: all shuffled alike",
    )
    micro_batch_size: int | None = Field(
        default=None, ge=1, description="most examples (or pairs) in one pack; none: no limit"
    )
    micro_batch_tokens: Annotated[int, Field(ge=8)] | Literal["auto"] = Field(
        default="auto",
        description="most tokens in one pack: decides the memory, never the result; "
        "auto: the most that fits and is fast, by a measurement at the start",
    )
    learning_rate: float | Literal["auto"] = Field(
        default="auto",
        description="highest learning rate; auto: by the method, the base's hidden size and the run's length: of LoRA "
        "5e-4 * (2000 / size)^0.781, half as much again in up to 500 steps",
    )
    lr_schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine",
        description="how the learning rate goes down to 0 after the warm-up; constant: it does not",
    )
    warmup_ratio: float = Field(
        default=0.05, ge=0, lt=1, description="share of the steps in which the rate goes up"
    )
    warmup_steps: int | None = Field(
        default=None, ge=0, description="the same as a number of steps; wins over the share"
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay of the adapter")
    max_grad_norm: float = Field(default=1.0, gt=0, description="gradients are scaled down to this norm")
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**31,
        description="decides the adapter's start, the order of examples, and dropout",
    )
    validation_share: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the training data that is held out for the validation loss; of plain texts whole "
        "documents, as far as there are small ones; of compared answers all to one question together",
    )
    evaluate_every: int | None = Field(
        default=None, ge=1, description="steps between validations; none: once an epoch"
    )
    save_every: int | None = Field(
        default=None, ge=1, description="steps between checkpoints; none: once an epoch"
    )
    keep_checkpoints: int = Field(
        default=2, ge=1, description="how many of the last checkpoints stay; the best stays too"
    )

    @model_validator(mode="after")
    def _rate_is_positive(self) -> "TrainingSettings":
        if self.learning_rate != "auto" and not (0 < self.learning_rate < math.inf):
            raise ValueError(f"learning_rate must be a number above 0, or auto; it is {self.learning_rate}")
        return self

    def steps_per_epoch(self, num_examples: int) -> int:
        """Return the steps of one epoch; the last one takes what is left."""
        return math.ceil(num_examples / self.batch_size)

    def num_steps(self, num_examples: int) -> int:
        """Return the steps of the whole run."""
        steps = max(1, round(self.epochs * self.steps_per_epoch(num_examples)))
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def num_warmup_steps(self, num_steps: int) -> int:
        """Return the steps in which the learning rate goes up."""
        return (
            self.warmup_steps if self.warmup_steps is not None else math.ceil(self.warmup_ratio * num_steps)
        )


ObjectiveName = Literal["sft", "text", "dpo", "ipo", "orpo", "simpo", "kto"]
_BETA: dict[str, float] = {"dpo": 0.1, "ipo": 0.1, "orpo": 0.1, "simpo": 2.0, "kto": 0.1}
_MARGIN = 1.0
_WEIGHT = 1.0  # of KTO's answers, whatever their label
_KINDS: dict[str, RowKind] = {"sft": "answers", "text": "documents", "kto": "labelled"}


def objective_defaults(name: str) -> dict[str, float]:
    """Return what those settings of the objective ``name`` stand for that are left out."""
    own = {"simpo": {"margin": _MARGIN}, "kto": {"desirable_weight": _WEIGHT, "undesirable_weight": _WEIGHT}}
    return {"beta": _BETA[name], **own.get(name, {})} if name in _BETA else {}


class ObjectiveSettings(BaseModel):
    """What is learnt from a row; section ``objective`` of a run file.

    The losses stand in preference.py and kto.py.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: ObjectiveName = Field(
        default="sft",
        description="sft: answers; text: every token of plain texts; dpo, ipo, orpo, simpo: pairs of a chosen and a "
        "rejected answer; kto: answers labelled true or false, one by one",
    )
    beta: float | None = Field(
        default=None,
        gt=0,
        description="how strongly the base is held on to (dpo, ipo, kto; 0.1), the weight of the odds ratio (orpo; "
        "0.1), or the scale of rewards (simpo; 2)",
    )
    margin: float | None = Field(
        default=None, ge=0, description="reward by which a chosen answer should lead (simpo; 1)"
    )
    desirable_weight: float | None = Field(
        default=None, gt=0, description="weight of answers labelled true (kto; 1)"
    )
    undesirable_weight: float | None = Field(
        default=None, gt=0, description="weight of answers labelled false (kto; 1)"
    )

    @model_validator(mode="after")
    def _owns_its_settings(self) -> "ObjectiveSettings":
        if self.beta is not None and self.name in ("sft", "text"):
            raise ValueError(
                f"beta is no setting of {self.name}; it belongs to dpo, ipo, orpo, simpo and kto"
            )
        if self.margin is not None and self.name != "simpo":
            raise ValueError(f"margin is no setting of {self.name}; it belongs to simpo")
        for key in ("desirable_weight", "undesirable_weight"):
            if getattr(self, key) is not None and self.name != "kto":
                raise ValueError(f"{key} is no setting of {self.name}; it belongs to kto")
        return self

    @property
    def kind(self) -> RowKind:
        """What a row of its data is."""
        return _KINDS.get(self.name, "pairs")

    @property
    def needs_reference(self) -> bool:
        return self.name in ("dpo", "ipo", "kto")

    @property
    def passes_a_step(self) -> int:
        """Passes without gradient that each step makes over its examples: of the model, and of the base."""
        return 2 if self.name == "kto" else 0

    @property
    def scale(self) -> float:
        return self.beta if self.beta is not None else _BETA[self.name]

    @property
    def target_margin(self) -> float:
        return self.margin if self.margin is not None else _MARGIN

    @property
    def weight_of_desirable(self) -> float:
        return self.desirable_weight if self.desirable_weight is not None else _WEIGHT

    @property
    def weight_of_undesirable(self) -> float:
        return self.undesirable_weight if self.undesirable_weight is not None else _WEIGHT

    @property
    def rate_multiple(self) -> float:
        """The learning rate beside that of answers: as TRL's defaults stand to each other, 1e-6 to 2e-5."""
        return 1.0 if self.name in ("sft", "text") else 0.05


class OutputSettings(BaseModel):
    """Where a run is written and who is told of it; section ``run`` of a run file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = Field(default=None, description="folder of the run; none: data and date")
    root: str = Field(default="runs", description="folder that holds the runs")
    resume: Literal["auto", "never"] = Field(
        default="auto",
        description="auto: go on from the last checkpoint of a run of this name; never: refuse to",
    )
    trackers: tuple[Literal["tensorboard", "trackio", "wandb", "mlflow"], ...] = Field(
        default=(), description="experiment trackers that also get every step's metrics; each needs its extra"
    )
    lost_after_seconds: float = Field(
        default=600,
        gt=0,
        description="several processes: one that has not answered the others for so long is lost, and the run ends",
    )
    sample_questions: tuple[str, ...] = Field(
        default=(), description="questions asked during training, to watch it learn"
    )
    sample_every: int | None = Field(
        default=None, ge=1, description="steps between them; none: once an epoch"
    )

    @field_validator("name")
    @classmethod
    def _can_name_a_folder(cls, name: str | None) -> str | None:
        if name is not None and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is None:
            raise ValueError(
                "a run's name has English letters, digits and . _ -, and begins with a letter or digit, as in "
                f"{re.sub('[^A-Za-z0-9._-]+', '-', name).strip('-._') or 'handbook-2'}"
            )
        return name
