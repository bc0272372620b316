"""Adapters on disk: a plain PEFT folder, written whole, checked before it is trusted (adapter_folder.py)."""

import copy
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lorasmith.errors import AdapterError, first_line
from lorasmith.files import whole_folder, write_checksums
from lorasmith.model.adapter_folder import CONFIG, PREFIX, WEIGHTS, check_finite, read_adapter_config
from lorasmith.model.boft import rotate_by_blocks, spare_boft_kernel
from lorasmith.model.methods import start_of
from lorasmith.model.quiet import quiet_loading

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def save_adapter(model: "PeftModel", folder: Path, *, allow_no_effect: bool = False) -> float | None:
    """Write the active adapter as a plain PEFT folder and return the norm of its update to the base.

    None where the method is no LoRA. What began inside the base's weights (PiSSA, OLoRA) is written as a plain
    LoRA adapter of the untouched base, of twice the rank.

    The folder appears whole or not at all; an older adapter there is replaced only then. A checkpoint of
    step 0 passes ``allow_no_effect``: its B matrices are still zero.

    Raises:
        AdapterError: a weight is NaN or infinite, or the adapter does nothing; nothing is written.
    """
    from peft import get_peft_model_state_dict

    name = str(model.active_adapter)
    with quiet_loading():
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    weights = {key: tensor.detach().to("cpu").contiguous() for key, tensor in state.items()}
    for key, tensor in weights.items():
        check_finite(key, tensor, "The adapter to be saved")
    norm = update_norm(model)
    if norm == 0 and not allow_no_effect:
        raise AdapterError(
            "The adapter has no effect: every lora_B is zero, as before the first step. It was not saved. "
            "Train for at least one step with a learning rate above 0."
        )
    config: Any = copy.copy(model.peft_config[name])
    config.inference_mode = True
    for key in ("target_modules", "feedforward_modules"):
        if isinstance(getattr(config, key, None), set):  # a set's order would change from run to run
            setattr(config, key, sorted(getattr(config, key)))
    _move_start(model, weights, config)
    with whole_folder(folder) as part:
        config.save_pretrained(str(part))
        save_file(weights, part / WEIGHTS, metadata={"format": "pt"})
        write_checksums(part)
    return norm


def _move_start(model: "PeftModel", weights: dict[str, torch.Tensor], config: Any) -> None:
    """Turn an adapter of the changed base into one of the base as it was.

    (W - s B0 A0) + s B A  =  W + s [B, -B0] [A; A0]        r' = 2 r,  lora_alpha' = 2 lora_alpha,  s' = s
    """
    starts = {path: start for path, layer in model.named_modules() if (start := start_of(layer))}
    for path, (A0, B0) in starts.items():
        a, b = f"{path}.lora_A.weight", f"{path}.lora_B.weight"
        weights[a] = torch.cat([weights[a], A0.cpu()], dim=0)
        weights[b] = torch.cat([weights[b], -B0.cpu()], dim=1).contiguous()
    if starts:
        config.r, config.lora_alpha, config.init_lora_weights = 2 * config.r, 2 * config.lora_alpha, True


def load_adapter(model: "PreTrainedModel", folder: Path, *, trainable: bool = False) -> "PeftModel":
    """Return ``model`` with the adapter of a PEFT folder attached; its weights are float32.

    Folders written by plain PEFT are as good as our own.

    Raises:
        AdapterError: the folder is refused by :func:`read_adapter_config`, or fits another base.
    """
    from peft import PeftModel, get_peft_model_state_dict

    is_boft = read_adapter_config(folder)["peft_type"] == "BOFT"
    if is_boft:
        spare_boft_kernel()
    weights = read_adapter_weights(folder)
    _check_fits(model, weights, folder)
    with quiet_loading():
        try:
            adapted = PeftModel.from_pretrained(
                model, str(folder), is_trainable=trainable, autocast_adapter_dtype=True
            )
        except (
            RuntimeError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            ImportError,
            re.error,
        ) as fault:
            raise AdapterError(
                f"The adapter {folder} does not fit this base: {first_line(fault)} "
                "Load it on the base it was trained on."
            ) from fault
        wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if extra := [key for key in sorted(set(weights) - wanted) if not key.endswith(".base_layer.weight")]:
        raise AdapterError(
            f"The adapter {folder} holds {len(extra)} tensors that its {CONFIG} does not ask for, such as "
            f"{extra[0][:200]}; they would be left out without a word. The two files do not belong together."
        )
    if absent := wanted - set(weights):
        raise AdapterError(
            f"The adapter {folder} is not complete: {len(absent)} tensors that its {CONFIG} asks for are "
            f"missing from {WEIGHTS}, such as {min(absent)}. Copy it again."
        )
    if is_boft:
        rotate_by_blocks(adapted)
    return adapted if trainable else adapted.eval()


def read_adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter that was inspected, under PEFT's names on disk.

    Raises:
        AdapterError: the file has been damaged since.
    """
    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as fault:
        raise AdapterError(f"{folder / WEIGHTS} is damaged: {fault}. Copy it again.") from fault


def update_norm(model: torch.nn.Module) -> float | None:
    """Return the Frobenius norm of all updates together: sqrt(sum of ||scaling B A||^2) over adapted layers.

    ||B A||^2 = trace((B'B)(A A')), two R x R products, so W-sized matrices are never built. How dropout or
    DoRA reshape an update is not counted. None where there is no LoRA layer.
    """
    total, is_lora = 0.0, False
    for module in model.modules():
        for name, down in getattr(module, "lora_A", {}).items():
            if not hasattr(down, "weight"):
                continue
            A, B = down.weight.detach().double(), module.lora_B[name].weight.detach().double()  # type: ignore
            is_lora = True
            if A.dim() != 2:
                continue
            if start := start_of(module):
                A, B = torch.cat([A, start[0].double()]), torch.cat([B, -start[1].double()], dim=1)
            squared = ((B.T @ B) * (A @ A.T)).sum().clamp(min=0)
            total += float(squared) * float(module.scaling[name]) ** 2  # type: ignore[index]
    return total**0.5 if is_lora else None


def _check_fits(model: "PreTrainedModel", weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Compare lora_A [R, D_in] and lora_B [D_out, R] with their layers; PEFT's own message is a long list."""
    modules = dict(model.named_modules())
    for key, tensor in weights.items():
        found = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_(A|B)\.weight", key)
        if not found or tensor.dim() != 2:
            continue
        path, side = found.groups()
        layer = modules.get(path)
        if layer is None:
            raise AdapterError(
                f"The adapter {folder} changes {path}, which this base does not have. "
                "Load it on the base it was trained on."
            )
        width = {"A": getattr(layer, "in_features", None), "B": getattr(layer, "out_features", None)}[side]
        has = tensor.shape[1] if side == "A" else tensor.shape[0]
        if width is not None and has != width:
            raise AdapterError(
                f"The adapter {folder} does not fit this base: {path} is {width} numbers wide here, and the "
                f"adapter was made for {has}. Load it on the base it was trained on."
            )
