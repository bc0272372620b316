"""What a run file may say about the base and the adapter: sections ``base`` and ``method``. Needs no torch."""

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from peft import LoraConfig

BUILT_IN = "smollm2-135m"
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


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
    trust_remote_code: bool = Field(
        default=False, description="Run Python files that come with the model. Only for an author you trust."
    )


class LoraSettings(BaseModel):
    """Size and place of the adapter (section "method" of a run file).

    The defaults are those of "LoRA Without Regret" (Schulman et al. 2025): every linear layer, not attention
    alone, and lora_alpha = 32.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    r: int = Field(
        default=16, ge=1, description="Rank of the adapter: its width, and so its capacity and size."
    )
    lora_alpha: float = Field(
        default=32, gt=0, description="The adapter's output is scaled by lora_alpha / r."
    )
    lora_dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of the adapter's inputs dropped in training; above 0, prefixes cannot be shared.",
    )
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear",
        description="Which linear layers get an adapter: all but the output head, or names like q_proj.",
    )
    use_rslora: bool = Field(
        default=False, description="Scale by lora_alpha / sqrt(r) instead (rank-stabilised LoRA)."
    )
    layers_to_transform: tuple[int, ...] | None = Field(
        default=None, description="Only these decoder layers, counted from 0; none given: all."
    )

    def to_peft(self, target_modules: tuple[str, ...] | None = None) -> "LoraConfig":
        """Return PEFT's config; ``target_modules`` are the names that "all-linear" means in a given model."""
        from peft import LoraConfig

        # PEFT's own "all-linear" is not written into adapter_config.json as names, and vLLM wants names.
        names = target_modules or self.target_modules
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            lora_alpha=int(self.lora_alpha) if self.lora_alpha == int(self.lora_alpha) else self.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=self.lora_dropout,
            target_modules=names if isinstance(names, str) else list(names),
            use_rslora=self.use_rslora,
            layers_to_transform=None if self.layers_to_transform is None else list(self.layers_to_transform),
        )
