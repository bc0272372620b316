"""What a run file may say about the base: its section ``base``. Needs no torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

BUILT_IN = "smollm2-135m"
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Quantization = Literal["none", "int8", "nf4"]


class BaseSettings(BaseModel):
    """Which model to start from, and how to hold it in memory (section "base" of a run file)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        default=BUILT_IN,
        description=f"Hub id, folder of a transformers model, .gguf file, or the built-in {BUILT_IN}.",
    )
    revision: str | None = Field(
        default=None,
        description="Branch, tag or commit of a Hub id; the commit found is written into run.json.",
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1 or mps.")
    dtype: Dtype = Field(
        default="auto",
        description="Number format of the frozen weights; auto: bfloat16 where it is fast, else float32.",
    )
    quantization: Quantization = Field(
        default="none",
        description="Hold the frozen weights in 8 bits (int8) or about 4.1 (nf4) while training; merging, asking and "
        "reports use the unquantised base. Needs the extra quantized.",
    )
    trust_remote_code: bool = Field(
        default=False, description="Run Python files that come with the model. Only for an author you trust."
    )
