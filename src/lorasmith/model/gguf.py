"""Turn a .gguf file into a transformers folder, once: its weights dequantised to float32 safetensors.

transformers can read GGUF itself, but it parses the header three times, entry by entry (35 seconds for the
built-in base, against about 4 here), and it does not know the built-in base's way of cutting text. So that
family, a Llama with SmolLM's tokenizer, has its own short reader, whose weights a test holds equal to those
of transformers. Every other file goes through transformers.
"""

import io
import struct
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import save_file

from lorasmith.errors import BaseModelError
from lorasmith.model.quiet import quiet_loading

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Value types of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_CONTROL_TOKEN, _USER_TOKEN = 3, 4

# How a byte-level vocabulary cuts text before merging. transformers knows these rules; any other it takes for
# GPT-2's without a word, and the model would then read other tokens than it was trained on.
_RULES_OF_TRANSFORMERS = frozenset(
    {"default", "gpt-2", "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2", "dbrx"}
    | {"smaug-bpe", "tekken", "qwen2", "deepseek-r1-qwen", "megrez", "qwen35", "gpt-4o", "llama4"}
)


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the file: torch's order of dimensions, ggml's type, bytes from the start of the data."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """What a .gguf file says before its weights: metadata, tensors, and where the data starts (bytes)."""

    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]
    data_start: int


def convert_gguf(file: Path, folder: Path) -> None:
    """Write ``file`` into the empty ``folder`` as config, tokenizer and float32 safetensors.

    Raises:
        BaseModelError: not a GGUF file, or one whose model or tokenizer cannot be rebuilt exactly.
    """
    header = read_header(file)
    says = header.metadata.get
    pre = says("tokenizer.ggml.pre", "default")
    if (says("general.architecture"), says("tokenizer.ggml.model"), pre) == ("llama", "gpt2", "smollm"):
        _convert_smollm(file, header, folder)
        return
    if says("tokenizer.ggml.model") == "gpt2" and pre not in _RULES_OF_TRANSFORMERS:
        raise BaseModelError(
            f'{file}: its tokenizer cuts text by the rule "{pre}", which cannot be rebuilt here: the model '
            "would read other tokens than it knows. Use the model's safetensors folder or Hub id instead."
        )
    _convert_with_transformers(file, folder)


def read_header(file: Path) -> GgufHeader:
    """Read the metadata and the table of tensors; 0.3 s for a vocabulary of 49,152 tokens."""
    with file.open("rb") as f:
        if f.read(4) != b"GGUF":
            raise BaseModelError(f"{file} is not a GGUF file: it does not start with the letters GGUF.")
        try:
            version, num_tensors, num_values = _read(f, "IQQ")
            if version not in (2, 3):
                raise BaseModelError(f"{file} is GGUF version {version}; versions 2 and 3 can be read.")
            metadata = {}
            for _ in range(num_values):
                key = _read_string(f)
                metadata[key] = _read_value(f, *_read(f, "I"))
            tensors = tuple(_read_tensor(f) for _ in range(num_tensors))
        except (struct.error, KeyError, UnicodeDecodeError) as fault:
            raise BaseModelError(
                f"{file} is damaged: its header cannot be read. Download it again."
            ) from fault
        alignment = metadata.get("general.alignment", 32)
        return GgufHeader(metadata, tensors, -(-f.tell() // alignment) * alignment)


def _read(f: BinaryIO, layout: str) -> tuple[Any, ...]:
    layout = "<" + layout
    return struct.unpack(layout, f.read(struct.calcsize(layout)))


def _read_string(f: BinaryIO) -> str:
    (length,) = _read(f, "Q")
    raw = f.read(length)
    if len(raw) < length:
        raise struct.error("the file ends inside a string")
    return raw.decode("utf-8")


def _read_value(f: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _read_string(f)
    if kind == _ARRAY:
        element, count = _read(f, "IQ")
        if element in _SCALARS:
            return list(_read(f, f"{count}{_SCALARS[element]}"))
        return [_read_value(f, element) for _ in range(count)]
    return _read(f, _SCALARS[kind])[0]


def _read_tensor(f: BinaryIO) -> GgufTensor:
    name = _read_string(f)
    (num_dims,) = _read(f, "I")
    dims = _read(f, f"{num_dims}Q")
    ggml_type, offset = _read(f, "IQ")
    shape = tuple(reversed(dims))  # ggml counts the fastest dimension first
    return GgufTensor(name, shape, ggml_type, offset)


def _convert_smollm(file: Path, header: GgufHeader, folder: Path) -> None:
    from transformers import GenerationConfig, LlamaConfig

    metadata = header.metadata
    names = {tensor.name for tensor in header.tensors}
    heads = metadata["llama.attention.head_count"]
    key_heads = metadata.get("llama.attention.head_count_kv", heads)
    special = {
        f"{name}_token_id": metadata[f"tokenizer.ggml.{key}_token_id"]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    config = LlamaConfig(
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=metadata["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": metadata.get("llama.rope.freq_base", 10000.0)},
        tie_word_embeddings="output.weight" not in names,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        **special,
    )
    weights = {}
    for tensor in header.tensors:
        name = _transformers_name(tensor.name, file)
        weight = _dequantise(file, header, tensor)
        if name.endswith("q_proj.weight"):
            weight = _undo_rotary_order(weight, heads)
        elif name.endswith("k_proj.weight"):
            weight = _undo_rotary_order(weight, key_heads)
        weights[name] = weight.contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    GenerationConfig(**{key: id for key, id in special.items() if key != "unk_token_id"}).save_pretrained(
        folder
    )
    _smollm_tokenizer(metadata).save_pretrained(folder)


_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _transformers_name(name: str, file: Path) -> str:
    """Return "model.layers.3.self_attn.q_proj.weight" for "blk.3.attn_q.weight"."""
    match name.split("."):
        case ["blk", layer, part, "weight"] if part in _IN_BLOCK:
            return f"model.layers.{layer}.{_IN_BLOCK[part]}.weight"
        case [part, "weight"] if part in _OUTER:
            return f"{_OUTER[part]}.weight"
    raise BaseModelError(
        f"{file} holds the tensor {name}, which a plain Llama does not have. "
        "Use the model's safetensors folder or Hub id instead of the .gguf file."
    )


def _dequantise(file: Path, header: GgufHeader, tensor: GgufTensor) -> torch.Tensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType(tensor.ggml_type)
    block_values, block_bytes = GGML_QUANT_SIZES[kind]
    count = int(np.prod(tensor.shape)) // block_values * block_bytes
    raw = np.fromfile(file, dtype=np.uint8, count=count, offset=header.data_start + tensor.offset)
    if raw.size < count:
        raise BaseModelError(
            f"{file} is cut short: it ends inside the tensor {tensor.name}. Download it again."
        )
    rows = raw.reshape(*tensor.shape[:-1], -1)
    if kind == GGMLQuantizationType.F32:
        values = rows.view(np.float32)
    elif kind == GGMLQuantizationType.F16:
        values = rows.view(np.float16).astype(np.float32)
    else:
        values = dequantize(rows, kind)
    return torch.from_numpy(values.reshape(tensor.shape))


def _undo_rotary_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return q or k rows [H*K, D] in transformers' order.

    llama.cpp rotates neighbouring rows (0,1), (2,3); transformers rotates halves (0,K/2), (1,K/2+1). With K=4
    the file's rows a0 b0 a1 b1 become a0 a1 b0 b1.
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def _smollm_tokenizer(metadata: dict[str, Any]):
    """Return the file's byte-level BPE tokenizer; as SmolLM's own, it cuts out each digit first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    whole = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in whole])
    whole = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _USER_TOKEN]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in whole])
    special = {
        f"{name}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **special,
    )


def _convert_with_transformers(file: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    model = read_with_transformers(file)
    with quiet_loading(), redirect_stderr(io.StringIO()):
        try:
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        except _FAULTS_OF_TRANSFORMERS as fault:
            raise _unreadable(file, fault) from fault
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def read_with_transformers(file: Path) -> "PreTrainedModel":
    """Return the model in ``file``, dequantised to float32 by transformers' own reader.

    Raises:
        BaseModelError: transformers cannot read it.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    # Its conversion bar goes past transformers' own switch, straight to stderr.
    with quiet_loading(), redirect_stderr(io.StringIO()):
        try:
            # Without dequantize=True the weights stay packed: slow, and impossible to save.
            return AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            ).eval()
        except _FAULTS_OF_TRANSFORMERS as fault:
            raise _unreadable(file, fault) from fault


_FAULTS_OF_TRANSFORMERS = (OSError, ValueError, KeyError, NotImplementedError)


def _unreadable(file: Path, fault: Exception) -> BaseModelError:
    return BaseModelError(
        f"{file} cannot be read by transformers: {fault} "
        "Use the model's safetensors folder or Hub id instead of the .gguf file."
    )
