"""Which fast parts a run uses; section ``engine`` of a run file."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class EngineSettings(BaseModel):
    """Every part is exact; the switches are for comparison and for finding faults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    attention: Literal["auto", "bucketed", "flex", "masked", "padded"] = Field(
        default="auto",
        description="how packs are computed: bucketed (batched products, for CPUs), flex (FlexAttention, for CUDA), "
        "masked (a mask matrix, anywhere); padded: no packs, one example a row through stock transformers; "
        "auto: the fastest that the model and the device allow",
    )
    share_prefixes: bool = Field(
        default=True, description="compute a prefix that several examples share only once"
    )
    chunked_loss: bool = Field(default=True, description="logits for learnt tokens only, a chunk at a time")
    fused_lora: bool = Field(
        default=True,
        description="compute a layer and its LoRA as one function that keeps its input once, and BOFT's rotation "
        "by its blocks; false: by PEFT's own layers",
    )
    product_dtype: Literal["auto", "float32", "same"] = Field(
        default="auto",
        description="number format of matrix products over a 16-bit base: same as the base, or float32, which is "
        "several times faster on CPUs without 16-bit units; auto: by a short measurement",
    )
    compile: bool | Literal["auto"] = Field(
        default="auto",
        description="fuse what stands between matrix products by torch.compile; takes a minute or two at the "
        "start; auto: only if the run is long enough to earn that back",
    )
    reuse_frozen_layers: bool = Field(
        default=True,
        description="compute the layers below the first adapted one once a run, not once an epoch",
    )
    gradient_checkpointing: bool | Literal["auto"] = Field(
        default="auto",
        description="recompute activations in the backward pass: less memory, more time; "
        "auto: only if the largest packs do not fit without",
    )
    shard_base: bool = Field(
        default=False,
        description="several processes: each keeps only its part of the base's layers, and they are gathered as they "
        "are used; for a base that does not fit one GPU",
    )
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default="auto",
        description="CPU threads; auto: all cores, or fewer if a short measurement finds them faster",
    )
