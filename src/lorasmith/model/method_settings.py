"""The tuning methods, one small class each: section ``method`` of a run file. Needs no torch.

    name                        what is trained beside the frozen weights
    lora rslora dora            W + s B A, with s = alpha / r, alpha / sqrt(r), and with the length of each row apart
    pissa olora                 the same, started from the weights' own SVD or QR decomposition
    lora_plus                   the same, B learning faster than A
    adalora                     W + s B E A, ranks given to the layers that use them
    vera                        W + b B d A: A and B frozen and random, two vectors trained
    oft boft                    R W: R orthogonal, of blocks or of butterflies
    ia3                         a factor for each number that a layer takes or gives
    prompt prefix p_tuning      virtual tokens before every text; no weight is touched
    full                        nothing beside them: the weights themselves

``to_peft`` of each maps it to PEFT's own config. ``rate_multiple`` says how high its learning rate is beside that of
full fine-tuning: LoRA's is that of "LoRA Without Regret" (Schulman et al. 2025), 10 and in short runs 15, since B
starts at zero and A learns next to nothing until B has grown; the others are the orders of magnitude of their papers.
"""

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from peft import PeftConfig

SHORT_RUN = 500  # steps
_SHORT_LORA = 15.0

Names = Literal["all-linear"] | tuple[str, ...]

_NAME = (
    "Tuning method: lora, rslora, dora, pissa, olora, lora_plus, adalora, vera, oft, boft, ia3, prompt, prefix, "
    "p_tuning or full."
)
_TARGETS = "Which linear layers get an adapter: all but the output head, or names like q_proj."
_LAYERS = "Only these decoder layers, counted from 0; none given: all."
_DROPOUT = "Share of the adapter's inputs dropped in training; above 0, prefixes cannot be shared."
_VIRTUAL = "Virtual tokens that stand before every text; they take their room of the model's context."


class _Method(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rate_multiple: ClassVar[float] = 10.0
    short_rate_multiple: ClassVar[float | None] = None  # up to SHORT_RUN steps, where it is another

    def rate_multiple_for(self, num_steps: int) -> float:
        """Return how high the learning rate of a run of ``num_steps`` is beside that of full fine-tuning."""
        if self.short_rate_multiple is not None and num_steps <= SHORT_RUN:
            return self.short_rate_multiple
        return self.rate_multiple

    @property
    def uses_virtual_tokens(self) -> bool:
        return isinstance(self, (PromptSettings, PrefixSettings, PTuningSettings))

    @property
    def changes_base(self) -> bool:
        """Whether the method's start moves the base's own weights."""
        return isinstance(self, (PissaSettings, OloraSettings))


class _OnLinearLayers(_Method):
    """A method that puts something on linear layers; ``targets`` are the names that "all-linear" stands for."""

    target_modules: Names = Field(default="all-linear", description=_TARGETS)
    layers_to_transform: tuple[int, ...] | None = Field(default=None, description=_LAYERS)

    def _places(self, targets: tuple[str, ...] | None) -> dict[str, Any]:
        # PEFT's own "all-linear" is not written into adapter_config.json as names, and vLLM wants names.
        names = targets or self.target_modules
        return {
            "task_type": "CAUSAL_LM",
            "target_modules": names if isinstance(names, str) else list(names),
            "layers_to_transform": None
            if self.layers_to_transform is None
            else list(self.layers_to_transform),
        }


class _LowRank(_OnLinearLayers):
    """Size and place of a low-rank adapter.

    The defaults are those of "LoRA Without Regret" (Schulman et al. 2025): every linear layer, not attention
    alone, and lora_alpha = 32.
    """

    r: int = Field(
        default=16, ge=1, description="Rank of the adapter: its width, and so its capacity and size."
    )
    lora_alpha: float = Field(
        default=32, gt=0, description="The adapter's output is scaled by lora_alpha / r."
    )
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description=_DROPOUT)

    _more: ClassVar[dict[str, Any]] = {}  # what the kind sets of PEFT's LoraConfig

    def to_peft(self, targets: tuple[str, ...] | None = None) -> "PeftConfig":
        from peft import LoraConfig

        return LoraConfig(
            r=self.r,
            lora_alpha=_whole(self.lora_alpha),  # type: ignore[arg-type]
            lora_dropout=self.lora_dropout,
            **self._places(targets),
            **self._more,
        )


class LoraSettings(_LowRank):
    """Low-rank adapters: Hu et al. 2021, arXiv 2106.09685."""

    short_rate_multiple = _SHORT_LORA

    name: Literal["lora"] = Field(default="lora", description=_NAME)
    use_rslora: bool = Field(
        default=False, description="Scale by lora_alpha / sqrt(r) instead (rank-stabilised LoRA)."
    )

    def to_peft(self, targets: tuple[str, ...] | None = None) -> "PeftConfig":
        config: Any = super().to_peft(targets)
        config.use_rslora = self.use_rslora
        return config


class RsLoraSettings(_LowRank):
    """LoRA scaled by lora_alpha / sqrt(r): Kalajdzievski 2023, arXiv 2312.03732."""

    short_rate_multiple = _SHORT_LORA

    name: Literal["rslora"] = Field(default="rslora", description=_NAME)
    lora_alpha: float = Field(
        default=8, gt=0, description="The adapter's output is scaled by lora_alpha / sqrt(r)."
    )
    _more = {"use_rslora": True}


class DoraSettings(_LowRank):
    """LoRA on the direction of each row of W, its length trained apart: Liu et al. 2024, arXiv 2402.09353."""

    short_rate_multiple = _SHORT_LORA

    name: Literal["dora"] = Field(default="dora", description=_NAME)
    _more = {"use_dora": True}


class PissaSettings(_LowRank):
    """LoRA that starts as W's largest singular directions: Meng et al. 2024, arXiv 2404.02948."""

    rate_multiple = 2.0  # A and B start large, and what they hold was learnt before

    name: Literal["pissa"] = Field(default="pissa", description=_NAME)
    lora_alpha: float = Field(
        default=16, gt=0, description="The adapter's output is scaled by lora_alpha / r; the paper has 1."
    )
    svd_iterations: int = Field(
        default=16,
        ge=1,
        description="Rounds of the fast SVD of each weight at the start (the paper's niter).",
    )

    def to_peft(self, targets: tuple[str, ...] | None = None) -> "PeftConfig":
        config: Any = super().to_peft(targets)
        config.init_lora_weights = f"pissa_niter_{self.svd_iterations}"
        return config


class OloraSettings(_LowRank):
    """LoRA that starts from W's QR decomposition: Büyükakyüz 2024, arXiv 2406.01775."""

    rate_multiple = 2.0

    name: Literal["olora"] = Field(default="olora", description=_NAME)
    lora_alpha: float = Field(
        default=16, gt=0, description="The adapter's output is scaled by lora_alpha / r."
    )
    _more = {"init_lora_weights": "olora"}


class LoraPlusSettings(_LowRank):
    """LoRA whose B learns faster than its A: Hayou et al. 2024, arXiv 2402.12354."""

    rate_multiple = 2.5  # A's; with B's at 16 times that, their geometric mean is LoRA's

    name: Literal["lora_plus"] = Field(default="lora_plus", description=_NAME)
    loraplus_lr_ratio: float = Field(
        default=16,
        ge=1,
        description="B's learning rate as a multiple of A's, which is training.learning_rate.",
    )


class AdaLoraSettings(_OnLinearLayers):
    """Ranks given to the layers that use them: Zhang et al. 2023, arXiv 2303.10512."""

    name: Literal["adalora"] = Field(default="adalora", description=_NAME)
    init_r: int = Field(default=24, ge=1, description="Rank that every layer starts with.")
    target_r: int = Field(
        default=16, ge=1, description="Rank at the end, on average over the layers; below init_r."
    )
    lora_alpha: float = Field(
        default=32, gt=0, description="The adapter's output is scaled by lora_alpha / r."
    )
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description=_DROPOUT)
    tinit: int | None = Field(
        default=None, ge=0, description="Steps before ranks are taken away; none: a tenth of the run."
    )
    tfinal: int | None = Field(
        default=None, ge=0, description="Steps at the end with the ranks as they are; none: three tenths."
    )
    orth_reg_weight: float = Field(
        default=0.5, gt=0, description="Weight of the penalty that keeps A and B orthogonal."
    )

    @model_validator(mode="after")
    def _takes_ranks_away(self) -> Self:
        if self.target_r >= self.init_r:
            raise ValueError(
                f"adalora goes from rank init_r ({self.init_r}) down to target_r ({self.target_r}), which must be "
                "smaller; set both, or take lora with method.r"
            )
        return self

    def to_peft(self, targets: tuple[str, ...] | None = None, num_steps: int = 1000) -> "PeftConfig":
        """Return PEFT's config for a run of ``num_steps``: the ranks' schedule depends on them."""
        from peft import AdaLoraConfig

        return AdaLoraConfig(
            init_r=self.init_r,
            target_r=self.target_r,
            lora_alpha=_whole(self.lora_alpha),  # type: ignore[arg-type]
            lora_dropout=self.lora_dropout,
            tinit=num_steps // 10 if self.tinit is None else self.tinit,
            tfinal=3 * num_steps // 10 if self.tfinal is None else self.tfinal,
            total_step=num_steps,
            orth_reg_weight=self.orth_reg_weight,
            **self._places(targets),
        )


class VeraSettings(_OnLinearLayers):
    """Two trained vectors around frozen random A and B: Kopiczko et al. 2023, arXiv 2310.11454."""

    rate_multiple = 50.0

    name: Literal["vera"] = Field(default="vera", description=_NAME)
    r: int = Field(default=256, ge=1, description="Rows of the random A that all layers share.")
    d_initial: float = Field(default=0.1, gt=0, description="Where every number of the vector d starts.")
    vera_dropout: float = Field(default=0.0, ge=0, lt=1, description=_DROPOUT)

    def to_peft(self, targets: tuple[str, ...] | None = None) -> "PeftConfig":
        from peft import VeraConfig

        return VeraConfig(
            r=self.r, d_initial=self.d_initial, vera_dropout=self.vera_dropout, **self._places(targets)
        )


class OftSettings(_OnLinearLayers):
    """Rotations of a layer's inputs in blocks: Qiu et al. 2023, arXiv 2306.07280."""

    name: Literal["oft"] = Field(default="oft", description=_NAME)
    oft_block_size: int = Field(
        default=32, ge=2, description="Inputs that are rotated together; divides the layers' input sizes."
    )

    def to_peft(self, targets: tuple[str, ...] | None = None) -> "PeftConfig":
        from peft import OFTConfig

        return OFTConfig(oft_block_size=self.oft_block_size, **self._places(targets))


class BoftSettings(_OnLinearLayers):
    """Rotations made of butterfly factors: Liu et al. 2023, arXiv 2311.06243."""

    name: Literal["boft"] = Field(default="boft", description=_NAME)
    boft_block_size: int = Field(
        default=4, ge=2, description="Inputs that are rotated together; divides the layers' input sizes."
    )
    boft_n_butterfly_factor: int = Field(
        default=1, ge=1, description="Butterfly factors one after the other; 1 is OFT."
    )

    def to_peft(self, targets: tuple[str, ...] | None = None) -> "PeftConfig":
        from peft import BOFTConfig

        return BOFTConfig(
            boft_block_size=self.boft_block_size,
            boft_n_butterfly_factor=self.boft_n_butterfly_factor,
            **self._places(targets),
        )


class Ia3Settings(_Method):
    """A factor for each key, value and inner number of the MLP: Liu et al. 2022, arXiv 2205.05638."""

    rate_multiple = 50.0

    name: Literal["ia3"] = Field(default="ia3", description=_NAME)
    target_modules: tuple[str, ...] | None = Field(
        default=None,
        description="Names of the layers that are scaled; none given: PEFT's choice for the architecture.",
    )
    feedforward_modules: tuple[str, ...] | None = Field(
        default=None, description="Those of them whose inputs are scaled, and not the outputs."
    )

    def to_peft(self, targets: tuple[str, ...] | None = None) -> "PeftConfig":
        from peft import IA3Config

        names = targets or self.target_modules
        return IA3Config(
            task_type="CAUSAL_LM",
            target_modules=None if names is None else list(names),
            feedforward_modules=None if self.feedforward_modules is None else list(self.feedforward_modules),
        )


class PromptSettings(_Method):
    """Trained embeddings before every text: Lester et al. 2021, arXiv 2104.08691."""

    rate_multiple = 100.0

    name: Literal["prompt"] = Field(default="prompt", description=_NAME)
    num_virtual_tokens: int = Field(default=20, ge=1, description=_VIRTUAL)
    prompt_tuning_init: Literal["sample_vocab", "random"] = Field(
        default="sample_vocab", description="How they start: as the embeddings of random words, or at random."
    )

    def to_peft(self, targets: tuple[str, ...] | None = None) -> "PeftConfig":
        from peft import PromptTuningConfig, PromptTuningInit

        return PromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=self.num_virtual_tokens,
            prompt_tuning_init=PromptTuningInit[self.prompt_tuning_init.upper()],
        )


class PrefixSettings(_Method):
    """Trained keys and values in every layer, before every text: Li and Liang 2021, arXiv 2101.00190."""

    rate_multiple = 100.0

    name: Literal["prefix"] = Field(default="prefix", description=_NAME)
    num_virtual_tokens: int = Field(default=20, ge=1, description=_VIRTUAL)
    prefix_projection: bool = Field(
        default=False, description="Train them through a small network, which is dropped when they are saved."
    )
    encoder_hidden_size: int | None = Field(
        default=None, ge=1, description="Width of that network; none: the model's own."
    )

    def to_peft(self, targets: tuple[str, ...] | None = None) -> "PeftConfig":
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=self.num_virtual_tokens,
            prefix_projection=self.prefix_projection,
            encoder_hidden_size=self.encoder_hidden_size,  # type: ignore[arg-type]
        )


class PTuningSettings(_Method):
    """Embeddings before every text, trained through a network that is dropped in the end: arXiv 2103.10385."""

    name: Literal["p_tuning"] = Field(default="p_tuning", description=_NAME)
    num_virtual_tokens: int = Field(default=20, ge=1, description=_VIRTUAL)
    encoder_hidden_size: int = Field(default=128, ge=1, description="Width of that network.")

    def to_peft(self, targets: tuple[str, ...] | None = None) -> "PeftConfig":
        from peft import PromptEncoderConfig

        return PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=self.num_virtual_tokens,
            encoder_hidden_size=self.encoder_hidden_size,
        )


class FullSettings(_Method):
    """Every weight of the model is trained, in float32: 16 bytes a weight with its gradient and AdamW's moments."""

    rate_multiple = 1.0

    name: Literal["full"] = Field(default="full", description=_NAME)


AdapterSettings = (
    LoraSettings
    | RsLoraSettings
    | DoraSettings
    | PissaSettings
    | OloraSettings
    | LoraPlusSettings
    | AdaLoraSettings
    | VeraSettings
    | OftSettings
    | BoftSettings
    | Ia3Settings
    | PromptSettings
    | PrefixSettings
    | PTuningSettings
)
MethodSettings = Annotated[AdapterSettings | FullSettings, Field(discriminator="name")]

METHODS: dict[str, type[_Method]] = {
    kind.model_fields["name"].default: kind for kind in (*get_args(AdapterSettings), FullSettings)
}


def _whole(number: float) -> float:
    """Return 32 for 32.0: other programs read adapter_config.json too, and some want an integer there."""
    return int(number) if math.isfinite(number) and number == int(number) else number
