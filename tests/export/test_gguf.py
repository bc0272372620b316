"""GGUF: real llama.cpp and transformers open what is written, and answer as the merged model does."""

import json

import pytest
import torch
from gguf import GGMLQuantizationType, dequantize
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from lorasmith.data.example import Message
from lorasmith.data.prompts import choose_recipe
from lorasmith.data.settings import PromptSettings
from lorasmith.errors import ExportError
from lorasmith.export.gguf import pre_tokenizer_name, write_model
from lorasmith.export.llama_cpp import answer_with_llama_cpp
from lorasmith.export.merge import merge
from lorasmith.export.ollama import make_modelfile
from lorasmith.export.proof import encode_questions
from lorasmith.export.quantise import byte_shape, kind_of, pack
from lorasmith.export.questions import held_out_questions
from lorasmith.export.write import export
from lorasmith.model.device import choose_device
from lorasmith.model.found import find_model
from lorasmith.model.gguf import read_header
from tests.export.test_merge import QUESTIONS, make_base, make_run


@pytest.fixture
def run(tmp_path, tiny_base_folder, tiny_tokenizer):
    return make_run(tmp_path / "faq", tiny_base_folder, tiny_tokenizer)


@pytest.fixture(scope="module")
def taught(tmp_path_factory, tiny_tokenizer):
    """A model that is sure of its answers to the general questions, as a trained one is and a random one is not."""
    folder = make_base(tmp_path_factory.mktemp("taught") / "faq", tiny_tokenizer)
    found = find_model(folder)
    asked = encode_questions(held_out_questions(None, 20), found.recipe, tiny_tokenizer)
    rows = []
    for i, question in enumerate(asked):
        answer = tiny_tokenizer(f"It is {7 * i}.<|im_end|>").input_ids
        rows.append((torch.tensor([*question, *answer]), len(question)))
    ids = torch.nn.utils.rnn.pad_sequence([row for row, _ in rows], batch_first=True)
    labels = torch.full_like(ids, -100)
    for i, (row, start) in enumerate(rows):
        labels[i, start : len(row)] = row[start:]
    torch.manual_seed(0)
    model = found.load(choose_device("cpu", "float32")).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(80):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05
    model.save_pretrained(folder)
    return folder


def test_llama_cpp_and_transformers_answer_from_every_quantisation(tmp_path, taught):
    pytest.importorskip("xllamacpp")
    least = {"f32": 20, "f16": 20, "bf16": 18, "q8_0": 18, "q4_0": 0, "q4_k_m": 0}
    allowed = {"f32": 1e-5, "f16": 1e-2, "bf16": 0.05, "q8_0": 0.05, "q4_0": 0.5, "q4_k_m": 0.5}
    done = export(taught, tmp_path / "out", quants=list(least), proves=True)
    assert [one.file.name for one in done.files] == [f"faq-{quant}.gguf" for quant in least]
    for one in done.files:
        proof = one.proof
        assert proof.num_questions == 20
        assert proof.num_same_answers >= least[one.quant]
        assert proof.num_same_in_transformers >= least[one.quant]
        assert len(proof.margins) == 20 - proof.num_same_answers
        assert all(0 < margin <= 2.5 * proof.max_logit_difference for margin in proof.margins)
        assert proof.perplexity_gguf == pytest.approx(proof.perplexity_merged, rel=allowed[one.quant])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize(("kind", "step"), [("Q4_K", 1 / 15), ("Q6_K", 1 / 63), ("Q5_0", 1 / 31)])
def test_llama_cpp_packs_what_the_gguf_package_unpacks(kind, step):
    pytest.importorskip("xllamacpp")
    kind = GGMLQuantizationType[kind]
    weight = torch.rand(3, 512, generator=torch.Generator().manual_seed(0)) - 0.5  # a spread of 1
    packed = pack(weight, kind)
    assert packed.shape == byte_shape(weight, kind)
    error = abs(dequantize(packed, kind) - weight.numpy()).max()
    assert step / 10 < error < step


def test_q4_k_m_mixes_types_as_llama_quantize_does():
    def kinds(part, width, layers=range(30)):
        weight = torch.empty(8, width)
        return "".join(
            kind_of(f"blk.{i}.{part}.weight", weight, "q4_k_m", 30, is_tied=True).name[1] for i in layers
        )

    # SmolLM2-135M has 30 layers: the first 3, the last 4, and of those between every third.
    mixed = "666" + "446" * 7 + "44" + "6666"
    assert (kinds("ffn_down", 1536), kinds("attn_v", 1536)) == (mixed, mixed)
    assert kinds("attn_q", 1536) == "4" * 30
    assert kinds("ffn_up", 576, [0]) == "5"  # rows no multiple of 256
    assert kind_of("token_embd.weight", torch.empty(8, 576), "q4_k_m", 30, is_tied=True).name == "Q8_0"
    assert kind_of("token_embd.weight", torch.empty(8, 512), "q4_k_m", 30, is_tied=True).name == "Q6_K"
    assert kind_of("token_embd.weight", torch.empty(8, 512), "q4_k_m", 30, is_tied=False).name == "Q4_K"
    assert kind_of("output_norm.weight", torch.empty(512), "q4_k_m", 30, is_tied=True).name == "F32"
    assert kind_of("output.weight", torch.empty(8, 40), "q8_0", 2, is_tied=False).name == "F16"


def test_a_run_is_merged_and_exported_with_both_proofs(tmp_path, run):
    pytest.importorskip("xllamacpp")
    (done,) = export(run, tmp_path / "out", quants=["f32"], proves=True, prompts=QUESTIONS).files
    assert (done.proof.num_same_answers, done.proof.num_questions, done.proof.margins) == (4, 4, ())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["faq", "out"]


def test_the_adapter_alone_over_the_bases_gguf_answers_as_the_merged_model(tmp_path, run, tiny_base_folder):
    pytest.importorskip("xllamacpp")
    (done,) = export(run, tmp_path / "lora", adapter_only=True, proves=True, prompts=QUESTIONS).files
    lora = done.file
    assert (done.proof.num_same_answers, done.proof.num_questions) == (4, 4)
    base = find_model(tiny_base_folder)
    write_model(base.base.folder, base.recipe, base.tokenizer, tmp_path / "base.gguf", quant="f32", name="b")
    merged = export(run, tmp_path / "merged", quants=["f32"]).files[0].file
    asked = encode_questions(QUESTIONS, base.recipe, base.tokenizer)
    tuned = answer_with_llama_cpp(tmp_path / "base.gguf", asked, lora)
    assert tuned == answer_with_llama_cpp(merged, asked)
    assert tuned != answer_with_llama_cpp(tmp_path / "base.gguf", asked)


def test_the_file_holds_template_and_stop_tokens(tmp_path, run):
    says = read_header(export(run, tmp_path / "out").files[0].file).metadata
    assert says["tokenizer.ggml.eos_token_id"] == 2
    assert "<|im_start|>" in says["tokenizer.chat_template"]
    assert says["tokenizer.ggml.pre"] == "gpt-2"


def test_an_answer_that_parts_is_refused_and_leaves_nothing(tmp_path, run, monkeypatch):
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr("lorasmith.export.gguf._rotary_order", lambda key, weight, config: weight)
    with pytest.raises(ExportError, match="of 20 questions as the merged model does"):
        export(run, tmp_path / "out", quants=["f32"], proves=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["faq"]


def test_other_architectures_and_quantisations_are_refused_by_name(tmp_path, run, tiny_tokenizer):
    qwen = make_base(tmp_path / "qwen", tiny_tokenizer, "qwen")
    with pytest.raises(ExportError, match="is a qwen2 model"):
        export(qwen, tmp_path / "out")
    with pytest.raises(ExportError, match="it can be f32, f16"):
        export(run, tmp_path / "out", quants=["f16", "q9"])
    with pytest.raises(ExportError, match="leave out several --quant"):
        export(run, tmp_path / "out", quants=["f16", "q8_0"], with_modelfile=True)
    merge(run, tmp_path / "merged", prompts=QUESTIONS)
    with pytest.raises(ExportError, match="it is a whole model"):
        export(tmp_path / "merged", tmp_path / "out", adapter_only=True)
    assert not (tmp_path / "out").exists()


def test_a_taken_folder_is_spared(tmp_path, run):
    (tmp_path / "photos").mkdir()
    with pytest.raises(ExportError, match="exists already"):
        export(run, tmp_path / "photos")
    with pytest.raises(ExportError, match="was not written by an export"):
        export(run, tmp_path / "photos", overwrite=True)


@pytest.mark.parametrize(
    ("pre", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            ),
            "smollm",
        ),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(False)]), None),
        (pre_tokenizers.Whitespace(), None),
    ],
)
def test_the_rule_is_named_or_refused(pre, name):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    if name:
        assert pre_tokenizer_name(wrapped) == name
    else:
        with pytest.raises(ExportError, match="would read other tokens"):
            pre_tokenizer_name(wrapped)


def test_llama_3s_frequencies_are_in_the_file(tmp_path, tiny_tokenizer):
    base = make_base(tmp_path / "base", tiny_tokenizer)
    config = LlamaConfig.from_pretrained(base)
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    config.save_pretrained(base)
    found = find_model(base)
    file = tmp_path / "x.gguf"
    write_model(base, found.recipe, found.tokenizer, file, quant="f32", name="x")
    assert "rope_freqs.weight" in {tensor.name for tensor in read_header(file).tensors}
    pytest.importorskip("xllamacpp")
    text = (Message("user", "When is payday? " * 12),)
    asked = encode_questions([text], found.recipe, found.tokenizer)
    ids = torch.tensor(asked)
    model = found.load(choose_device("cpu", "float32"))
    grown = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=2)[0, ids.shape[1] :]
    expected = found.tokenizer.decode([t for t in grown.tolist() if t != 2])
    assert answer_with_llama_cpp(file, asked) == [expected]


def test_a_modelfile_says_chat_and_alpaca(tiny_tokenizer):
    chat, _ = choose_recipe(PromptSettings(recipe="chat"), tiny_tokenizer)
    text = make_modelfile(chat, "./x.gguf")
    assert text.startswith("FROM ./x.gguf\nTEMPLATE")
    assert "{{ range .Messages }}" in text
    assert 'PARAMETER stop "<|im_end|>"' in text
    alpaca, _ = choose_recipe(PromptSettings(recipe="alpaca"), tiny_tokenizer)
    text = make_modelfile(alpaca, "./x.gguf")
    assert "{{ else }}Below is an instruction that describes a task." in text
    assert "{{ .Content }}\n\n### Response:\n{{ else if" in text
    assert '{{ .Content }}<|im_end|>\n\n### Instruction:\n{{ end }}{{ end }}"""' in text


def test_ollama_gets_a_modelfile_beside_the_file(tmp_path, run):
    export(run, tmp_path / "out", with_modelfile=True)
    assert "FROM ./faq-f16.gguf" in (tmp_path / "out" / "Modelfile").read_text()
    assert json.loads((tmp_path / "out" / "lorasmith_export.json").read_text())["files"] == [
        {"file": "faq-f16.gguf", "quant": "f16", "proof": None}
    ]
