"""What is trained beside the frozen base: low-rank adapters on its linear layers.

y = W x + (lora_alpha / r) * B A x          Hu et al. 2021, arXiv 2106.09685, section 4.1

             x [D_in]
      .--------'--------.
      |            A [r, D_in]     seeded normal-like start
 W [D_out, D_in]        |
   frozen          B [D_out, r]    starts at zero: at step 0 the model is the base
      '-------+---------'
              y [D_out]
"""

from typing import TYPE_CHECKING

import torch

from lorasmith.errors import SettingsError
from lorasmith.model.quiet import quiet_loading
from lorasmith.model.settings import LoraSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def attach_adapter(model: "PreTrainedModel", settings: LoraSettings, *, seed: int) -> "PeftModel":
    """Return the model with a fresh adapter: float32, seeded, the only weights that train.

    The adapter is float32 whatever the base's dtype (small updates vanish in bfloat16's 8 bits). The caller's
    random stream is left as it was.

    Raises:
        SettingsError: target_modules or layers_to_transform name nothing in this model.
    """
    from peft import get_peft_model

    names = _target_names(model, settings)
    with torch.random.fork_rng(devices=[]), quiet_loading():  # PEFT draws A on the CPU, then moves it
        torch.manual_seed(seed)
        adapted = get_peft_model(model, settings.to_peft(names), autocast_adapter_dtype=True)
    assert all(p.dtype is torch.float32 for p in adapted.parameters() if p.requires_grad)
    return adapted.eval()  # type: ignore[return-value]


def count_trainable(model: torch.nn.Module) -> int:
    """Return how many numbers train: for LoRA, the sum of r * (D_in + D_out) over the adapted layers."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def linear_names(model: "PreTrainedModel") -> tuple[str, ...]:
    """Return the last names of the model's linear layers, the output head excepted: ("down_proj", ...)."""
    return tuple(sorted({path.rsplit(".", 1)[-1] for path in _linear_paths(model)}))


def _linear_paths(model: "PreTrainedModel") -> list[str]:
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    return [
        path
        for path, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    ]


def _target_names(model: "PreTrainedModel", settings: LoraSettings) -> tuple[str, ...]:
    paths, present = _linear_paths(model), linear_names(model)
    names = present if settings.target_modules == "all-linear" else settings.target_modules
    if not names:
        raise SettingsError("method.target_modules is empty; name layers, or use all-linear.")
    unknown = [name for name in names if not any(path == name or path.endswith(f".{name}") for path in paths)]
    if unknown:
        raise SettingsError(
            f"method.target_modules names {', '.join(unknown)}, which this model does not have. "
            f"Its linear layers are {', '.join(present)}."
        )
    if settings.layers_to_transform is not None:
        depth = model.config.get_text_config().num_hidden_layers
        if not settings.layers_to_transform or not all(0 <= i < depth for i in settings.layers_to_transform):
            raise SettingsError(
                f"method.layers_to_transform is {list(settings.layers_to_transform)}; "
                f"this model has the layers 0 to {depth - 1}."
            )
    return tuple(names)
