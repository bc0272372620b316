"""What the adapter of each PEFT method may hold, beside LoRA's (adapter_folder.py): tensors by name, sizes that agree.

PEFT makes its tensors from the sizes in adapter_config.json before it looks into the file, so a size that no tensor
of the file has is refused: it might be a billion.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]

_PREFIX = r"base_model\.model\."


@dataclass(frozen=True)
class AdapterKind:
    """``tensor`` matches the names on disk, its one group the part's.

    ``fits`` says whether a tensor's sizes agree with adapter_config.json, ``misfit`` what of all does not, if anything.
    """

    tensor: re.Pattern[str]
    fits: Callable[[dict[str, Any], str, Shape], bool]
    misfit: Callable[[dict[str, Any], Mapping[str, Shape]], str | None]


def _kind(
    pattern: str,
    fits: Callable[[dict[str, Any], str, Shape], bool],
    misfit: Callable[[dict[str, Any], Mapping[str, Shape]], str | None] = lambda config, shapes: None,
) -> AdapterKind:
    return AdapterKind(re.compile(pattern), fits, misfit)


def _fits_vera(config: dict[str, Any], part: str, shape: Shape) -> bool:
    r = config.get("r")
    return {
        "vera_A": shape[:1] == (r,),
        "vera_B": shape[1:] == (r,),
        "vera_lambda_d": shape == (r,),
    }.get(part, len(shape) == 1)


def _fits_oft(config: dict[str, Any], part: str, shape: Shape) -> bool:
    size = config.get("oft_block_size")
    return type(size) is int and len(shape) == 2 and shape[1] == size * (size - 1) // 2


def _fits_boft(config: dict[str, Any], part: str, shape: Shape) -> bool:
    size, factors = config.get("boft_block_size"), config.get("boft_n_butterfly_factor")
    return part == "boft_s" or (len(shape) == 4 and shape[0] == factors and shape[2:] == (size, size))


def _fits_adalora(config: dict[str, Any], part: str, shape: Shape) -> bool:
    return type(config.get("init_r")) is int and len(shape) == 2


def _misfit_adalora(config: dict[str, Any], shapes: Mapping[str, Shape]) -> str | None:
    r = config["init_r"]
    for path in {key.rpartition(".")[0]: None for key in shapes}:
        A, B = shapes.get(f"{path}.lora_A"), shapes.get(f"{path}.lora_B")
        if A is None or B is None:
            return f"of {path[:200]} lora_A or lora_B is missing"
        if not 1 <= r <= max(A[1], B[0]):
            return f"init_r is {r:,}, and {path[:200]} is a layer of {A[1]:,} inputs and {B[0]:,} outputs"
    return None


def _fits_prompt(config: dict[str, Any], part: str, shape: Shape) -> bool:
    return _fits_virtual(config, shape, _width(config))


def _fits_prefix(config: dict[str, Any], part: str, shape: Shape) -> bool:
    layers = config.get("num_layers")
    width = _width(config) * 2 * layers if type(layers) is int else 0
    return _fits_virtual(config, shape, width)


def _fits_virtual(config: dict[str, Any], shape: Shape, width: int) -> bool:
    alone = config.get("num_transformer_submodules") in (None, 1)
    return alone and shape == (config.get("num_virtual_tokens"), width)


def _width(config: dict[str, Any]) -> int:
    width = config.get("token_dim")
    return width if type(width) is int else 0


KINDS: dict[str, AdapterKind] = {
    "ADALORA": _kind(_PREFIX + r".+\.(lora_A|lora_B|lora_E)", _fits_adalora, _misfit_adalora),
    "VERA": _kind(r"base_model\.(?:model\..+\.)?(vera_lambda_b|vera_lambda_d|vera_A|vera_B)", _fits_vera),
    "OFT": _kind(_PREFIX + r".+\.(oft_R)\.weight", _fits_oft),
    "BOFT": _kind(_PREFIX + r".+\.(boft_R|boft_s)", _fits_boft),
    "IA3": _kind(_PREFIX + r".+\.(ia3_l)", lambda config, part, shape: len(shape) == 2 and 1 in shape),
    "PROMPT_TUNING": _kind("(prompt_embeddings)", _fits_prompt),
    "P_TUNING": _kind("(prompt_embeddings)", _fits_prompt),
    "PREFIX_TUNING": _kind("(prompt_embeddings)", _fits_prefix),
}
VIRTUAL_TOKENS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")
