"""A base whose frozen weights are held in 8 or 4 bits, by bitsandbytes (extra quantized).

    int8    LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339): a scale for each row, outliers computed apart
    nf4     4-bit NormalFloat, its scales quantised once more (Dettmers et al. 2023, arXiv 2305.14314)

The output head, the embeddings and the norms stay as they are.
"""

import importlib.util
import logging
from typing import TYPE_CHECKING, Any

from lorasmith.errors import MissingExtraError
from lorasmith.model.settings import Quantization

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel


def loading_options(
    kind: Quantization, device: "torch.device", dtype: "torch.dtype", *, can_be_cut: bool = False
) -> dict[str, Any]:
    """Return what ``from_pretrained`` is told to load a base so; products are computed in ``dtype``.

    ``can_be_cut`` keeps the same packed bytes as float32 numbers: torch shards nothing else beside float32 norms.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    if kind == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError(f"base.quantization={kind}", "bitsandbytes", "quantized")
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,  # bitsandbytes computes in float32 unless told
            bnb_4bit_quant_storage="float32" if can_be_cut else "uint8",
        )
    return {"quantization_config": config, "device_map": {"": device}}


def frozen_linear_sizes(model: "PeftModel | PreTrainedModel") -> list[tuple[int, int]]:
    """Return (D_out, D_in) of every layer whose weight would be quantised; the adapter's own are not among them."""
    from torch import nn

    base: Any = model
    if hasattr(base, "get_base_model"):
        base = base.get_base_model()
    head = base.get_output_embeddings()
    return [
        (layer.weight.shape[0], layer.weight.shape[1])
        for layer in base.modules()
        if isinstance(layer, nn.Linear) and layer is not head and not layer.weight.requires_grad
    ]


def bytes_saved(model: "PeftModel | PreTrainedModel", kind: Quantization) -> int:
    """Return how many bytes the weights of a float32 ``model`` would take less, held as ``kind``."""
    saved = 0
    for D_out, D_in in frozen_linear_sizes(model) if kind != "none" else ():
        numbers = D_out * D_in
        # int8: a float32 scale a row. nf4: an 8-bit scale for 64 numbers, a float32 one for 256 of those.
        held = numbers + 4 * D_out if kind == "int8" else numbers / 2 + numbers / 64 + numbers / 64 / 64
        saved += round(4 * numbers - held)
    return saved


def make_trainable(model: "PreTrainedModel") -> "PreTrainedModel":
    """Return a base loaded with :func:`loading_options`, ready for an adapter whose gradients go through it.

    What stands beside the quantised weights (norms, embeddings, head) becomes float32, as PEFT's
    ``prepare_model_for_kbit_training`` does.
    """
    from peft import prepare_model_for_kbit_training

    for module in model.modules():
        # On CPUs with AVX512-bf16 any forward without gradients repacks the 4-bit weight, and from then on gradients
        # are wrong, with one warning (bitsandbytes 0.50). Without that kernel they are right.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    # Its int8 product says at every call that it rounds its inputs to float16: that is the method, and no fault.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    _let_go_of_files(model)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def _let_go_of_files(model: "PreTrainedModel") -> None:
    """Copy what still lies in the mapped files: a single tensor keeps all of the unquantised weights in memory."""
    from torch import nn

    for parameter in model.parameters():
        if type(parameter) is nn.Parameter and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
