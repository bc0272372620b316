"""What is trained beside the frozen base, by the method that method_settings.py names; most often LoRA.

y = W x + (lora_alpha / r) * B A x          Hu et al. 2021, arXiv 2106.09685, section 4.1

             x [D_in]
      .--------'--------.
      |            A [r, D_in]     seeded normal-like start
 W [D_out, D_in]        |
   frozen          B [D_out, r]    starts at zero: at step 0 the model is the base
      '-------+---------'
              y [D_out]
"""

import math
from typing import TYPE_CHECKING, Any

import torch

from lorasmith.errors import SettingsError
from lorasmith.model.boft import spare_boft_kernel
from lorasmith.model.method_settings import (
    AdaLoraSettings,
    AdapterSettings,
    BoftSettings,
    Ia3Settings,
    MethodSettings,
    OftSettings,
    VeraSettings,
)
from lorasmith.model.quiet import quiet_loading
from lorasmith.model.settings import BaseSettings

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel


def attach_adapter(
    model: "PreTrainedModel", settings: AdapterSettings, *, seed: int, num_steps: int | None = None
) -> "PeftModel":
    """Return the model with a fresh adapter: float32, seeded, the only weights that train.

    The adapter is float32 whatever the base's dtype (small updates vanish in bfloat16's 8 bits). The caller's
    random stream is left as it was. PiSSA and OLoRA take their start out of the base's own weights; it is kept
    beside the adapter (:func:`start_of`), so that what is saved fits the untouched base. ``num_steps`` is the
    run's length, which AdaLoRA's ranks follow.

    Raises:
        SettingsError: target_modules or layers_to_transform name nothing in this model, or the sizes do not fit.
    """
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]), quiet_loading():  # PEFT draws on the CPU, then moves it
        torch.manual_seed(seed)
        try:
            config = _configure(model, settings, seed, num_steps)
            adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
        except (ValueError, TypeError, AssertionError, RuntimeError, KeyError) as fault:
            raise SettingsError(
                f"PEFT cannot put method.name={settings.name} on this model: {str(fault).strip().rstrip('.!')}. "
                "Change the method's settings, or take method.name=lora."
            ) from fault
    _check_ranks(adapted, settings)
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype is not torch.float32:
            parameter.data = parameter.data.float()
    if settings.changes_base:
        _keep_start(adapted)
    return adapted.eval()  # type: ignore[return-value]


def _check_ranks(model: "PeftModel", settings: AdapterSettings) -> None:
    """Raise SettingsError for a rank above a layer's width both ways: an adapter that nobody would open again."""
    key = "init_r" if settings.name == "adalora" else "r"
    times = 2 if settings.changes_base else 1  # as it is saved
    for path, module in model.named_modules():
        if "default" not in getattr(module, "lora_A", ()):
            continue
        A, B = (
            getattr(part, "weight", part) for part in (module.lora_A["default"], module.lora_B["default"])
        )
        (r, inputs), outputs = A.shape, len(B)
        if times * r > max(inputs, outputs):
            most = max(inputs, outputs) // times
            raise SettingsError(
                f"method.{key}={r} is more than {path} can use, a layer of {inputs:,} inputs and {outputs:,} outputs: "
                f"above {most} a rank adds nothing but memory. Use {most} or less; 8 to 64 is usual."
            )


def train_all_weights(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return the model with every weight to be trained: full fine-tuning.

    Raises:
        SettingsError: its weights are not float32, in which small updates would vanish.
    """
    if model.dtype is not torch.float32:
        raise SettingsError(
            f"method.name=full trains the weights themselves, and in {str(model.dtype).removeprefix('torch.')} small "
            "updates vanish. Use base.dtype=float32 (or auto), or an adapter: method.name=lora."
        )
    return model.requires_grad_(True)


def check_method(method: MethodSettings, base: BaseSettings) -> None:
    """Raise SettingsError where the method cannot be used on a base that is held so."""
    how = f"base.quantization={base.quantization}"
    way_out = "Use base.quantization=none, or an adapter of the kind method.name=lora."
    if base.quantization == "none" or method.name in ("lora", "rslora", "lora_plus"):
        return
    if method.name == "full":
        raise SettingsError(
            f"method.name=full trains the weights themselves, and {how} keeps them in whole numbers that no gradient "
            f"moves. {way_out}"
        )
    if method.changes_base:
        raise SettingsError(
            f"method.name={method.name} takes its start out of the base's weights, and {how} would round what is left "
            f"of them once more. {way_out}"
        )
    raise SettingsError(
        f"method.name={method.name} with {how} was never tried here, so it is refused. {way_out}"
    )


def num_virtual_tokens(model: torch.nn.Module) -> int:
    """Return how many virtual tokens stand before every text; 0 for methods that have none."""
    config: Any = getattr(model, "active_peft_config", None)
    return config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0


def start_of(layer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the A and B that PiSSA or OLoRA took out of the layer's weight at the start; None of other methods."""
    buffers = dict(layer.named_buffers(recurse=False))
    return (buffers["start_A"], buffers["start_B"]) if "start_A" in buffers else None


def count_trainable(model: torch.nn.Module) -> int:
    """Return how many numbers train: for LoRA, the sum of r * (D_in + D_out) over the adapted layers."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_frozen(model: torch.nn.Module) -> int:
    """Return how many numbers stay as they are; those of a 4-bit weight lie two in a byte."""
    numbers = 0
    for parameter in model.parameters():
        state: Any = getattr(parameter, "quant_state", None)
        if not parameter.requires_grad:
            numbers += parameter.numel() if state is None else state.shape.numel()
    return numbers


def linear_names(model: "PreTrainedModel") -> tuple[str, ...]:
    """Return the last names of the model's linear layers, the output head excepted: ("down_proj", ...)."""
    return tuple(sorted({path.rsplit(".", 1)[-1] for path in _linear_paths(model)}))


def _keep_start(model: torch.nn.Module) -> None:
    """Keep each layer's A and B as they are now. Not part of its state: buffers, so that they move with it."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            module: Any = layer
            A, B = (side["default"].weight for side in (module.lora_A, module.lora_B))
            module.register_buffer("start_A", A.detach().clone(), persistent=False)
            module.register_buffer("start_B", B.detach().clone(), persistent=False)


def _configure(
    model: "PreTrainedModel", settings: AdapterSettings, seed: int, num_steps: int | None
) -> "PeftConfig":
    """Return PEFT's config with what depends on the model and the run filled in."""
    if settings.uses_virtual_tokens:
        return settings.to_peft()
    if isinstance(settings, Ia3Settings):
        names = settings.target_modules and _check_names(model, settings.target_modules)
        return settings.to_peft(names or None)
    names = _target_names(model, settings)
    if isinstance(settings, AdaLoraSettings):
        assert num_steps is not None, "the ranks' schedule depends on the run's length"
        return settings.to_peft(names, num_steps)
    if isinstance(settings, BoftSettings):
        spare_boft_kernel()
        if settings.boft_n_butterfly_factor > 1 and not torch.cuda.is_available():
            raise SettingsError(
                f"method.boft_n_butterfly_factor is {settings.boft_n_butterfly_factor}, and PEFT has more than one "
                "factor on CUDA only. Use 1."
            )
    if isinstance(settings, OftSettings):
        _check_blocks(model, names, settings.oft_block_size)
    config = settings.to_peft(names)
    if isinstance(settings, VeraSettings):
        config.projection_prng_key = seed  # type: ignore[attr-defined]
    return config


def _check_blocks(model: "PreTrainedModel", names: tuple[str, ...], size: int) -> None:
    """Raise SettingsError where blocks do not fill a layer's inputs: PEFT would take another size, with a warning."""
    inputs = {
        path: model.get_submodule(path).weight.shape[-1]  # type: ignore[union-attr,index]
        for path in _linear_paths(model)
        if any(_is_called(path, name) for name in names)
    }
    for path, count in inputs.items():
        if count % size:
            common = math.gcd(*inputs.values())
            fits = [divisor for divisor in range(2, common + 1) if common % divisor == 0]
            nearest = min(fits, key=lambda divisor: abs(divisor - size), default=None)
            raise SettingsError(
                f"method.oft_block_size={size} does not divide the {count:,} inputs of {path}. "
                + (f"Use {nearest}." if nearest else "Take method.name=lora.")
            )


def _is_called(path: str, name: str) -> bool:
    """Return whether PEFT means the layer at ``path`` by ``name``: all of the path, or its end."""
    return path == name or path.endswith(f".{name}")


def _linear_paths(model: "PreTrainedModel") -> list[str]:
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    ]


def _target_names(model: "PreTrainedModel", settings: Any) -> tuple[str, ...]:
    everything = settings.target_modules == "all-linear"
    names = linear_names(model) if everything else _check_names(model, settings.target_modules)
    if settings.layers_to_transform is not None:
        depth = model.config.get_text_config().num_hidden_layers
        if not settings.layers_to_transform or not all(0 <= i < depth for i in settings.layers_to_transform):
            raise SettingsError(
                f"method.layers_to_transform is {list(settings.layers_to_transform)}; "
                f"this model has the layers 0 to {depth - 1}."
            )
    return names


def _check_names(model: "PreTrainedModel", names: tuple[str, ...]) -> tuple[str, ...]:
    """Return ``names``, or raise a SettingsError: none is given, or one is of no linear layer."""
    if not names:
        raise SettingsError("method.target_modules is empty; name layers, or use all-linear.")
    paths = _linear_paths(model)
    unknown = [name for name in names if not any(_is_called(path, name) for path in paths)]
    if unknown:
        raise SettingsError(
            f"method.target_modules names {', '.join(unknown)}, which this model does not have. "
            f"Its linear layers are {', '.join(linear_names(model))}."
        )
    return names
