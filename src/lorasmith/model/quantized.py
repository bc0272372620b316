"""A base whose frozen weights are held in 8 or 4 bits, by bitsandbytes (extra quantized).

    int8    LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339): a scale for each row, outliers computed apart
    nf4     4-bit NormalFloat, its scales quantised once more (Dettmers et al. 2023, arXiv 2305.14314)

The output head, the embeddings and the norms stay as they are.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

from lorasmith.errors import MissingExtraError
from lorasmith.model.settings import Quantization

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def loading_options(kind: Quantization, device: "torch.device", dtype: "torch.dtype") -> dict[str, Any]:
    """Return what ``from_pretrained`` is told to load a base so; products are computed in ``dtype``.

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
        )
    return {"quantization_config": config, "device_map": {"": device}}


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
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
