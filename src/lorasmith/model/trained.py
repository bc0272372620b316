"""What a run has trained, on disk: an adapter beside the base or, after full fine-tuning, a whole model.

FOLDER/adapter/     plain PEFT
FOLDER/model/       plain transformers, in float32
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

from lorasmith.files import whole_folder, write_checksums
from lorasmith.model.adapter import read_adapter_weights, save_adapter
from lorasmith.model.adapter_folder import CONFIG, WEIGHTS, check_finite
from lorasmith.model.base import weight_files
from lorasmith.model.methods import start_of
from lorasmith.model.quiet import quiet_loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER, MODEL = "adapter", "model"


def save_trained(
    model: "PeftModel | PreTrainedModel",
    folder: Path,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    allow_no_effect: bool = False,
) -> float | None:
    """Write what was trained below ``folder``; return the norm of the update where the method has one.

    A whole model gets ``tokenizer`` beside it.

    Raises:
        AdapterError: a weight is NaN or infinite, or the adapter does nothing; nothing is written.
    """
    if isinstance(model, PeftModel):
        return save_adapter(model, folder / ADAPTER, allow_no_effect=allow_no_effect)
    for name, parameter in model.named_parameters():
        check_finite(name, parameter.detach(), "The model to be saved")
    with whole_folder(folder / MODEL) as part, quiet_loading():
        model.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        write_checksums(part)
    return None


def trained_files(folder: Path) -> tuple[str, ...]:
    """Return the files that must be there below ``folder``, by their path from it."""
    if (folder / MODEL).is_dir():
        return (f"{MODEL}/config.json",)
    return (f"{ADAPTER}/{CONFIG}", f"{ADAPTER}/{WEIGHTS}")


def restore_trained(model: "PeftModel | PreTrainedModel", folder: Path) -> None:
    """Put what :func:`save_trained` wrote back into the model that wrote it."""
    if isinstance(model, PeftModel):
        set_peft_model_state_dict(model, read_adapter_weights(folder / ADAPTER))
        return
    for file in weight_files(folder / MODEL):
        model.load_state_dict(load_file(file), strict=False)  # a tied head is not on disk a second time


def is_saved_as_trained(model: "PeftModel | PreTrainedModel") -> bool:
    """Whether the saved folder holds the very numbers that are trained.

    PiSSA and OLoRA are saved as plain LoRA of twice the rank, AdaLoRA without the ranks taken away, P-tuning and
    projected prefixes without their network.
    """
    if not isinstance(model, PeftModel):
        return True
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kind = model.active_peft_config
    hides = "ADALORA" in str(kind.peft_type) or any(start_of(module) for module in model.modules())
    return not hides and not any("prompt_encoder" in name and ".embedding." not in name for name in wanted)


def load_trained_numbers(model: torch.nn.Module, saved: dict[str, torch.Tensor]) -> None:
    """Copy trained numbers by their parameters' names into ``model``."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in saved:
                parameter.copy_(saved[name])
