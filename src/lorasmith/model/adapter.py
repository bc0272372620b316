"""Adapters on disk: a plain PEFT folder, written whole, checked before it is trusted."""

import copy
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lorasmith.errors import AdapterError
from lorasmith.files import recover_folder, whole_folder
from lorasmith.model.quiet import quiet_loading

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."


def save_adapter(model: "PeftModel", folder: Path, *, allow_no_effect: bool = False) -> float:
    """Write the active adapter as a plain PEFT folder and return the norm of its update to the base.

    The folder appears whole or not at all; an older adapter there is replaced only then. A checkpoint of
    step 0 passes ``allow_no_effect``: its B matrices are still zero.

    Raises:
        AdapterError: a weight is NaN or infinite, or the adapter does nothing; nothing is written.
    """
    from peft import get_peft_model_state_dict

    name = str(model.active_adapter)
    weights = {
        key: tensor.detach().to("cpu").contiguous()
        for key, tensor in get_peft_model_state_dict(
            model, adapter_name=name, save_embedding_layers=False
        ).items()
    }
    _check_finite(weights, "The adapter to be saved")
    norm = update_norm(model)
    if norm == 0 and not allow_no_effect:
        raise AdapterError(
            "The adapter has no effect: every lora_B is zero, as before the first step. It was not saved. "
            "Train for at least one step with a learning rate above 0."
        )
    config: Any = copy.copy(model.peft_config[name])
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # a set's order would change from run to run
    with whole_folder(folder) as part:
        config.save_pretrained(str(part))
        save_file(weights, part / WEIGHTS, metadata={"format": "pt"})
    return norm


def load_adapter(model: "PreTrainedModel", folder: Path, *, trainable: bool = False) -> "PeftModel":
    """Return ``model`` with the adapter of a PEFT folder attached; its weights are float32.

    Folders written by plain PEFT are as good as our own.

    Raises:
        AdapterError: files are missing or damaged, weights are a pickle, not finite, or fit another base.
    """
    from peft import PeftModel, get_peft_model_state_dict

    read_adapter_config(folder)
    weights = read_adapter_weights(folder)
    _check_fits(model, weights, folder)
    with quiet_loading():
        try:
            adapted = PeftModel.from_pretrained(
                model, str(folder), is_trainable=trainable, autocast_adapter_dtype=True
            )
        except (RuntimeError, ValueError, KeyError, TypeError) as fault:
            raise AdapterError(
                f"The adapter {folder} does not fit this base: {str(fault).strip().splitlines()[0]} "
                "Load it on the base it was trained on."
            ) from fault
    absent = set(get_peft_model_state_dict(adapted, save_embedding_layers=False)) - set(weights)
    if absent:
        raise AdapterError(
            f"The adapter {folder} is not complete: {len(absent)} tensors that its {CONFIG} asks for are "
            f"missing from {WEIGHTS}, such as {min(absent)}. Copy it again."
        )
    return adapted if trainable else adapted.eval()


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json as a dict, after checking that the folder is an adapter with safe weights.

    Raises:
        AdapterError: it is not.
    """
    recover_folder(folder)
    if not folder.is_dir():
        raise AdapterError(
            f"There is no adapter folder {folder}. A run keeps it in adapter/ once it has been trained."
        )
    if not (folder / CONFIG).is_file():
        raise AdapterError(f"{folder} is not an adapter folder: it has no {CONFIG}.")
    if not (folder / WEIGHTS).is_file():
        if (folder / PICKLE).exists():
            raise AdapterError(
                f"{folder} holds {PICKLE}, a Python pickle: opening one can run any code its author put in. "
                f"lorasmith reads {WEIGHTS} only. If you trust the author, save it again with a current PEFT."
            )
        raise AdapterError(f"{folder} is not complete: {WEIGHTS} is missing.")
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
    except ValueError as fault:
        raise AdapterError(f"{folder / CONFIG} is damaged: {fault}") from fault
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise AdapterError(f"{folder / CONFIG} is not a PEFT config: it names no peft_type.")
    return config


def read_adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors under PEFT's names on disk, all finite.

    Raises:
        AdapterError: the file is damaged, or a weight is NaN or infinite.
    """
    try:
        weights = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as fault:
        raise AdapterError(f"{folder / WEIGHTS} is damaged: {fault}. Copy it again.") from fault
    _check_finite(weights, f"The adapter {folder}")
    return weights


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def named_base(config: dict[str, Any], folder: Path) -> str:
    """Return the base that a plain PEFT folder names: a Hub id or an absolute path, and nothing cleverer.

    The folder may be a stranger's, so its text must not steer us to places relative to here or other hosts.

    Raises:
        AdapterError: it names none, or something else.
    """
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise AdapterError(f"{folder / CONFIG} names no base model. Pass the base it was trained on.")
    parts = base.replace("\\", "/").split("/")
    if (
        ".." in parts
        or "~" in base
        or "\0" in base
        or not (Path(base).is_absolute() or _HUB_ID.fullmatch(base))
    ):
        raise AdapterError(
            f"{folder / CONFIG} names the base {base!r}, which is neither a Hub id nor an absolute path. "
            "Pass the base it was trained on yourself."
        )
    return base


def update_norm(model: torch.nn.Module) -> float:
    """Return the Frobenius norm of all updates together: sqrt(sum of ||scaling B A||^2) over adapted layers.

    ||B A||^2 = trace((B'B)(A A')), two R x R products, so W-sized matrices are never built. How dropout or
    DoRA reshape an update is not counted.
    """
    total = 0.0
    for module in model.modules():
        for name, down in getattr(module, "lora_A", {}).items():
            if not hasattr(down, "weight"):
                continue
            A, B = down.weight.detach().double(), module.lora_B[name].weight.detach().double()  # type: ignore
            if A.dim() == 2:
                squared = ((B.T @ B) * (A @ A.T)).sum().clamp(min=0)
                total += float(squared) * float(module.scaling[name]) ** 2  # type: ignore[index]
    return total**0.5


def _check_finite(weights: dict[str, torch.Tensor], subject: str) -> None:
    for key, tensor in weights.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise AdapterError(
                f"{subject} holds NaN or infinite numbers in {key}. Go back to an earlier checkpoint; a "
                "lower learning_rate usually keeps training finite."
            )


def _check_fits(model: "PreTrainedModel", weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Compare lora_A [R, D_in] and lora_B [D_out, R] with their layers; PEFT's own message is a long list."""
    modules = dict(model.named_modules())
    for key, tensor in weights.items():
        found = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_(A|B)\.weight", key)
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
