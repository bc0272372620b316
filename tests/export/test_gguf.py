"""GGUF: real llama.cpp and transformers open what is written, and answer as the merged model does."""

import copy
import dataclasses
import json
import re

import jinja2
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

from lorasmith.cli.export import command
from lorasmith.data.example import Message
from lorasmith.data.prompts import PromptRecipe, choose_recipe
from lorasmith.data.settings import PromptSettings
from lorasmith.errors import ExportError, SettingsError
from lorasmith.export.chat_template import chat_template, count_equal_prompts
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
    with pytest.raises(
        ExportError, match=r"of 20 questions as the merged model does.*the perplexity goes from \d"
    ):
        export(run, tmp_path / "out", quants=["f32"], proves=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["faq"]


def test_what_llama_cpp_does_not_open_is_said_without_a_traceback(tmp_path):
    pytest.importorskip("xllamacpp")
    (tmp_path / "x.gguf").write_text("no model")
    with pytest.raises(ExportError, match=r"llama\.cpp does not open x\.gguf: .*llama-cli -m FILE"):
        answer_with_llama_cpp(tmp_path / "x.gguf", [[1, 2]])


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


def test_a_quantisation_of_the_adapter_alone_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="--adapter-only writes the adapter in float32"):
        command("faq", to="gguf", out=tmp_path / "out", quant=["q8_0"], adapter_only=True)


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


LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ bos_token }}[INST] <<SYS>>\n{{ m.content }}\n<</SYS>>\n\n"
    "{% elif m.role == 'user' %}{% if loop.previtem is undefined or loop.previtem.role == 'assistant' %}"
    "{{ bos_token }}[INST] {% endif %}{{ m.content }} [/INST]"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n\n{% endif %}"
)
ONE_QUESTION = (
    "{{ bos_token }}Q: {{ instruction }}\nOnce more: {{ instruction }}\nA:"
    "{% if messages[-1].role == 'assistant' %} {{ messages[-1].content }}{{ eos_token }}{% endif %}"
)


def read_modelfile(text):
    """Return (name, value) of each command, quotes taken off as Ollama's parser/parser.go does: it knows no escapes."""

    def unquote(value):
        for mark in ('"""', '"'):
            if value.startswith(mark):
                is_closed = len(value) >= 2 * len(mark) and value.endswith(mark)
                return value[len(mark) : -len(mark)] if is_closed else None
        return value

    found, lines = [], iter(text.splitlines())
    for line in lines:
        name, value = line.removeprefix("PARAMETER ").split(" ", 1)
        while unquote(value.strip()) is None:
            value += "\n" + next(lines)
        found.append((name, unquote(value.strip())))
    return found


def render_go(template, messages):
    """Return what Go prints of a template of :func:`go_template`, by Jinja."""
    jinja, ends = "", []
    for piece in re.split(r"(\{\{ .*? \}\})", template):
        action = piece.removeprefix("{{ ").removesuffix(" }}")
        if piece == action:
            jinja += piece
        elif action == "range .Messages":
            jinja += "{% for m in messages %}"
            ends.append("for")
        elif action == "end":
            jinja += f"{{% end{ends.pop()} %}}"
        elif action == "else":
            jinja += "{% else %}"
        elif action.startswith(("if eq ", "else if eq ")):
            word, value, role = re.fullmatch(r'(if|else if) eq (.*Role) "(\w+)"', action).groups()
            value = {".Role": "m.role", "(index .Messages 0).Role": "messages[0].role"}[value]
            jinja += f"{{% {word.replace('else if', 'elif')} {value} == '{role}' %}}"
            ends += ["if"] if word == "if" else []
        else:
            names = {
                ".Content": "m.content",
                "(index .Messages 0).Content": "messages[0].content",
                ".Prompt": "messages[-1].content",
            }
            jinja += f"{{{{ {names.get(action, action)} }}}}"
    return jinja2.Template(jinja, keep_trailing_newline=True).render(messages=messages)


@pytest.mark.parametrize(
    ("template", "roles"),
    [
        (LLAMA_2, ["u", "su", "uau", "suauau"]),
        (LLAMA_3, ["u", "su", "uau", "suauau"]),
        (LLAMA_3.replace("<|{{", "{{ '{{{|' }}{{").replace("\\n\\n{{", "{{ '{' }}{{"), ["u", "uau"]),
        (ONE_QUESTION, ["u"]),
    ],
    ids=["Llama 2", "Llama 3", "braces", "one question"],
)
@pytest.mark.parametrize("bos", ["", "<s>"])
def test_ollama_renders_the_trained_prompt_with_one_bos(template, roles, bos):
    specials = ("<s>", "</s>", "<|eot_id|>")
    recipe = PromptRecipe("mine", template, bos_token="<s>", eos_token="</s>", special_tokens=specials)
    modelfile = dict(read_modelfile(make_modelfile(recipe, "./x.gguf", added_bos=bos)))
    names = {"s": "system", "u": "user", "a": "assistant"}
    for talk in roles:
        messages = [Message(names[role], f"turn {place}") for place, role in enumerate(talk)]
        trained = "".join(part.text for part in recipe.render_prompt(messages))
        answered = [  # the space before an answer is the model's own
            Message(m.role, recipe.answer_lead() + m.content if m.role == "assistant" else m.content)
            for m in messages
        ]
        assert bos + render_go(modelfile["TEMPLATE"], answered) == trained


def test_stop_texts_reach_ollama_as_they_are():
    stops = ("\n### Instruction:", 'He said "no"\nthen', "C:\\new", " ")
    recipe = PromptRecipe(
        "mine", LLAMA_3, stop=stops, bos_token="<s>", eos_token="</s>", special_tokens=("</s>",)
    )
    said = read_modelfile(make_modelfile(recipe, "./x.gguf"))
    assert [value for name, value in said if name == "stop"] == ["</s>", *stops]
    assert ("temperature", "0") in said
    assert ("repeat_penalty", "1") in said
    with pytest.raises(ExportError, match="which a Modelfile cannot quote"):
        make_modelfile(dataclasses.replace(recipe, stop=('"""',)), "./x.gguf")


def test_llama_cpp_adds_a_bos_only_where_training_saw_one(tmp_path, tiny_base_folder, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    for name, adds in (("alpaca", True), ("chat", False)):
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        )
        recipe, _ = choose_recipe(PromptSettings(recipe=name), tokenizer)
        file = tmp_path / f"{name}.gguf"
        write_model(tiny_base_folder, recipe, tokenizer, file, quant="f32", name="x")
        assert read_header(file).metadata["tokenizer.ggml.add_bos_token"] == adds


OWN_LINE = (
    "\n{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}assistant:"
)


@pytest.mark.parametrize(
    ("name", "system"),
    [("chat", "Be brief."), ("alpaca", None), ("alpaca", "Be brief."), ("mine.jinja", None)],
)
def test_llama_cpp_reads_the_chat_template_of_every_recipe(
    tmp_path, tiny_base_folder, tiny_tokenizer, name, system
):
    xllamacpp = pytest.importorskip("xllamacpp")
    (tmp_path / "mine.jinja").write_text(OWN_LINE)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    recipe = str(tmp_path / name) if "." in name else name
    recipe, _ = choose_recipe(PromptSettings(recipe=recipe, system=system), tokenizer)
    write_model(tiny_base_folder, recipe, tokenizer, tmp_path / "x.gguf", quant="f32", name="x")
    tokenizer.chat_template = chat_template(recipe)
    assert read_header(tmp_path / "x.gguf").metadata["tokenizer.chat_template"] == tokenizer.chat_template
    params = xllamacpp.CommonParams()
    params.model.path, params.verbosity, params.warmup = str(tmp_path / "x.gguf"), -1, False
    params.n_ctx, params.n_parallel = 512, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    talks = [(Message("user", "When is payday?"),)]
    talks.append((*talks[0], Message("assistant", "The 1st."), Message("user", "Why?")))
    for talk in talks:
        turns = [{"role": message.role, "content": message.content} for message in talk]
        reply = server.handle_chat_completions({"messages": turns, "max_tokens": 1, "temperature": 0})
        assert reply["usage"]["prompt_tokens"] == len(encode_questions([talk], recipe, tokenizer)[0])
    assert count_equal_prompts(recipe, tokenizer, talks) == len(talks)


def test_ollama_gets_a_modelfile_beside_the_file(tmp_path, run):
    export(run, tmp_path / "out", with_modelfile=True)
    assert "FROM ./faq-f16.gguf" in (tmp_path / "out" / "Modelfile").read_text()
    assert json.loads((tmp_path / "out" / "lorasmith_export.json").read_text())["files"] == [
        {"file": "faq-f16.gguf", "quant": "f16", "proof": None}
    ]
