"""Which fast parts a run uses; section ``engine`` of a run file."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class EngineSettings(BaseModel):
    """Every part is exact; the switches are for comparison and for finding faults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    attention: Literal["auto", "packed", "padded"] = Field(
        default="auto",
        description="packed: examples of a step share one sequence, isolated from each other; "
        "padded: one example a row through stock transformers; auto: packed where the model allows it",
    )
    share_prefixes: bool = Field(
        default=True, description="compute a prefix that several examples share only once"
    )
    chunked_loss: bool = Field(default=True, description="logits for learnt tokens only, a chunk at a time")
    reuse_frozen_layers: bool = Field(
        default=True,
        description="compute the layers below the first adapted one once a run, not once an epoch",
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        default="auto",
        description="recompute activations in the backward pass: less memory, more time; "
        "auto: only if the largest packs do not fit without",
    )
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="CPU threads; auto: all cores, or fewer if a short measurement finds them faster",
    )
