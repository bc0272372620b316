"""Beside llama.cpp's own llama-quantize (llama_model_quantize, from the cyllama wheel): the same bytes."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, LlamaFileType
from transformers import LlamaConfig, LlamaForCausalLM

from lorasmith.export.quantise import QUANTS
from lorasmith.export.write import export

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("cyllama", "xllamacpp"))), reason="cyllama or xllamacpp is missing"
)

# In a process of its own: two copies of llama.cpp in one need not get on.
PROGRAM = """
import sys
from cyllama.llama import llama_cpp
source, target, file_type = sys.argv[1:]
params = llama_cpp.LlamaModelQuantizeParams()
params.ftype, params.nthread = int(file_type), 1
llama_cpp.model_quantize(source, target, params)
"""


def make_wide_base(folder, tokenizer, width, is_tied):
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=9,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=2,
        tie_word_embeddings=is_tied,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# 96 is no multiple of a k-quant's 256 numbers.
@pytest.mark.parametrize(("width", "is_tied"), [(256, True), (256, False), (96, False)])
def test_every_tensor_has_the_type_and_the_bytes_of_llama_quantize(tmp_path, tiny_tokenizer, width, is_tied):
    folder = make_wide_base(tmp_path / "base", tiny_tokenizer, width, is_tied)
    quants = [quant for quant in QUANTS if quant != "f32"]
    done = export(folder, tmp_path / "out", quants=["f32", *quants])
    exact, *packed = [one.file for one in done.files]
    for quant, file in zip(quants, packed, strict=True):
        target = tmp_path / f"{quant}.gguf"
        file_type = QUANTS[quant].file_type
        subprocess.run(
            [sys.executable, "-c", PROGRAM, exact, target, str(int(file_type))],
            check=True,
            capture_output=True,
        )
        ours, theirs = GGUFReader(file), GGUFReader(target)
        assert LlamaFileType(theirs.get_field("general.file_type").contents()) == file_type
        assert ours.get_field("general.file_type").contents() == file_type
        wanted = {tensor.name: tensor for tensor in theirs.tensors}
        assert wanted.keys() == {tensor.name for tensor in ours.tensors}
        for tensor in ours.tensors:
            if quant == "q4_0" and tensor.name == ("token_embd.weight" if is_tied else "output.weight"):
                assert tensor.tensor_type == GGMLQuantizationType.Q8_0  # finer than theirs, and no k-quant
                continue
            assert tensor.tensor_type == wanted[tensor.name].tensor_type, (quant, tensor.name)
            np.testing.assert_array_equal(tensor.data, wanted[tensor.name].data, (quant, tensor.name))
