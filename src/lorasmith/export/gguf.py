"""Write a Llama model, or a LoRA adapter for one, as a .gguf file for llama.cpp.

    merged/config.json      -> llama.* metadata
    merged/tokenizer.json   -> tokenizer.ggml.*: tokens, merges, the rule that cuts text, stop tokens, chat template
    merged/*.safetensors    -> tensors under ggml's names, quantised one at a time by the gguf package

llama.cpp rotates neighbouring rows of q and k where transformers rotates halves, so these rows are put in its order.
"""

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    GGUFWriter,
    RopeScalingType,
    TokenType,
)
from safetensors import safe_open

from lorasmith.data.example import Message
from lorasmith.data.prompts import PromptRecipe, adds_bos
from lorasmith.errors import ExportError
from lorasmith.export.chat_template import chat_template
from lorasmith.export.fold import plan_updates
from lorasmith.export.quantise import QUANTS, byte_shape, check_quant, kind_of, pack
from lorasmith.model.adapter_folder import read_adapter_config
from lorasmith.model.base import ResolvedBase, weight_files

_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}


def write_model(folder: Path, recipe: PromptRecipe, tokenizer, file: Path, *, quant: str, name: str) -> None:
    """Write the transformers folder of a Llama model as ``file``.

    Memory holds one tensor at a time. A matrix whose rows are no multiple of the quantiser's 32 stays float16.

    Raises:
        ExportError: another architecture, or a tokenizer whose rule llama.cpp does not have.
    """
    check_quant(quant)
    config = read_llama_config(folder)
    writer = GGUFWriter(file, "llama")
    try:
        writer.add_name(name)
        writer.add_file_type(QUANTS[quant].file_type)
        writer.add_quantization_version(2)
        _add_config(writer, config)
        _add_tokenizer(writer, tokenizer, recipe, config.vocab_size)
        choose = partial(
            kind_of,
            quant=quant,
            num_layers=config.num_hidden_layers,
            is_tied=config.tie_word_embeddings,
        )
        for ggml_name, tensor in _tensors(folder, config):
            kind = choose(ggml_name, tensor)
            shape = byte_shape(tensor, kind)
            writer.add_tensor_info(ggml_name, shape, np.dtype(np.uint8), math.prod(shape), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for ggml_name, tensor in _tensors(folder, config):
            kind = choose(ggml_name, tensor)
            writer.write_tensor_data(pack(tensor, kind))
    finally:
        writer.close()


def write_adapter(base: ResolvedBase, adapter: Path, file: Path, *, name: str) -> None:
    """Write a LoRA adapter as a GGUF that llama.cpp lays over the base's own GGUF (``--lora``).

    llama.cpp multiplies by alpha / rank; where PEFT scales otherwise, B carries the rest.

    Raises:
        ExportError: another architecture, or an adapter that is more than A and B on Llama's linear layers.
    """
    config = read_llama_config(base.folder)
    about = read_adapter_config(adapter)
    updates = plan_updates(base, adapter, config.to_dict(), False)
    if updates is None or not all(_ggml_name(key) and key not in _OUTER for key in updates):
        raise ExportError(
            f"The adapter {adapter} is more than A and B on a Llama's linear layers, and a GGUF LoRA holds nothing "
            "else. Leave out --adapter-only: the merged model can be exported."
        )
    alpha = float(about.get("lora_alpha", 8))
    writer = GGUFWriter(file, "llama")
    try:
        writer.add_type("adapter")
        writer.add_name(name)
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for key, update in updates.items():
            r = update.A.shape[0]
            B = update.B.float() * (update.scaling * r / alpha)
            stem = _ggml_name(key)
            writer.add_tensor(f"{stem}.lora_a", update.A.float().numpy())
            writer.add_tensor(f"{stem}.lora_b", _rotary_order(key, B, config).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def read_llama_config(folder: Path) -> Any:
    """Return the config of a Llama model.

    Raises:
        ExportError: it is another model, or a Llama with parts that this writer does not know.
    """
    from transformers import AutoConfig

    kind = json.loads((folder / "config.json").read_text("utf-8")).get("model_type")
    if kind != "llama":
        raise ExportError(
            f"{folder} is a {kind} model; lorasmith writes GGUF of llama models only. "
            "llama.cpp's convert_hf_to_gguf.py knows more of them."
        )
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    rope = config.rope_parameters["rope_type"]
    if config.attention_bias or config.mlp_bias or rope not in ("default", "linear", "llama3"):
        what = f"rope_type {rope}" if rope not in ("default", "linear", "llama3") else "biases"
        raise ExportError(f"{folder} is a Llama with {what}, which lorasmith does not write as GGUF.")
    return config


def pre_tokenizer_name(tokenizer) -> str:
    """Return llama.cpp's name for the rule by which ``tokenizer`` cuts text before merging.

    Raises:
        ExportError: llama.cpp has no rule that is known to be the same; it would read other tokens.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    about = json.loads(tokenizer.backend_tokenizer.to_str())
    model, pre = about["model"], about["pre_tokenizer"] or {}
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    if model["type"] == "BPE" and not model.get("byte_fallback") and not about["normalizer"]:
        last = steps[-1]
        is_byte_level = last.items() >= _BYTE_LEVEL.items()
        if is_byte_level and last.get("use_regex", True):
            if len(steps) == 1:
                return "gpt-2"
            if steps[:-1] == [{"type": "Digits", "individual_digits": True}]:
                return "smollm"
        elif is_byte_level and len(steps) == 2 and steps[0]["type"] == "Split":
            llama3 = {"Regex": GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]}
            if steps[0]["pattern"] == llama3 and model.get("ignore_merges"):
                return "llama-bpe"
    found = " + ".join(step.get("type", "none") for step in steps)
    raise ExportError(
        f"llama.cpp's name for this tokenizer's rule is not known here (a {model['type']} model, cutting by {found}; "
        "known are gpt-2, smollm and llama-bpe). Under a wrong name the model would read other tokens than it was "
        "trained on. llama.cpp's convert_hf_to_gguf.py knows more of them."
    )


def added_bos(tokenizer, recipe: PromptRecipe) -> str:
    """Return the bos token that llama.cpp is told to put before every prompt; empty if training saw none there."""
    if not adds_bos(tokenizer):
        return ""
    prompt = "".join(part.text for part in recipe.render_prompt([Message("user", "a")]))
    return tokenizer.bos_token if prompt.startswith(tokenizer.bos_token) else ""


def _add_config(writer: GGUFWriter, config: Any) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(config.rope_parameters["factor"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(writer: GGUFWriter, tokenizer, recipe: PromptRecipe, vocab_size: int) -> None:
    pre = pre_tokenizer_name(tokenizer)
    about = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["id"]: token for token in about["added_tokens"]}
    names = {id: text for text, id in tokenizer.get_vocab().items()}
    tokens, kinds = [], []
    for id in range(vocab_size):
        tokens.append(names.get(id, f"[PAD{id}]"))
        if id not in names:
            kinds.append(TokenType.UNUSED)
        elif id in added:
            kinds.append(TokenType.CONTROL if added[id]["special"] else TokenType.USER_DEFINED)
        else:
            kinds.append(TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = about["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    stops = recipe.stop_token_ids(tokenizer)
    if len(stops) > 3:
        raise ExportError(
            f"The recipe has {len(stops)} stop tokens; a GGUF file holds three (eos, eot, eom)."
        )
    for add, id in zip(
        (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), stops, strict=False
    ):
        add(id)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    writer.add_add_bos_token(bool(added_bos(tokenizer, recipe)))
    writer.add_add_space_prefix(False)
    writer.add_chat_template(chat_template(recipe))  # a full run's tokenizer has the base's own


def _tensors(folder: Path, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every tensor under ggml's name, rows of q and k in llama.cpp's order."""
    if config.rope_parameters["rope_type"] == "llama3":
        yield "rope_freqs.weight", _rope_factors(config)
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a dict)
                if key.endswith("rotary_emb.inv_freq"):
                    continue
                if key == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                name = _ggml_name(key)
                if name is None:
                    raise ExportError(f"{file} holds the tensor {key}, which a plain Llama does not have.")
                yield name, _rotary_order(key, tensors.get_tensor(key), config)


def _ggml_name(key: str) -> str | None:
    """Return "blk.3.attn_q.weight" for "model.layers.3.self_attn.q_proj.weight"."""
    match key.split("."):
        case ["model", "layers", layer, *part, "weight"] if ".".join(part) in _PARTS:
            return f"blk.{layer}.{_PARTS['.'.join(part)]}.weight"
    return _OUTER.get(key)


def _rotary_order(key: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Return q or k rows [H*K, D] in llama.cpp's order, all else as it is.

    transformers' a0 a1 b0 b1 (K=4: a0 turns with b0) becomes a0 b0 a1 b1.
    """
    if key.endswith("q_proj.weight"):
        heads = config.num_attention_heads
    elif key.endswith("k_proj.weight"):
        heads = config.num_key_value_heads
    else:
        return weight
    rows, width = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)


def _rope_factors(config: Any) -> torch.Tensor:
    """Return by what Llama 3.1 divides each frequency of the rotation, [K/2]."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    K = config.head_dim
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, K, 2, dtype=torch.float32) / K)
    return plain / scaled
