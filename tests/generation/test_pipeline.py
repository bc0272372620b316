"""The transformers pipeline, in process and beside a merged model, answers what Chat answers."""

import copy
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from export.test_merge import make_run
from lorasmith.data.example import Message
from lorasmith.data.settings import PromptSettings
from lorasmith.export.merge import merge
from lorasmith.generation.chat import Chat, open_chat
from lorasmith.generation.instruct_pipeline import InstructionTextGenerationPipeline
from lorasmith.generation.pipeline import open_pipeline
from lorasmith.generation.sampling import SamplingSettings

QUESTIONS = ["When is payday?", "Where is the office, and who may work there?", "gm"]
TASK = "instruction-text-generation"


def make(folder, base, tokenizer, prompt):
    """A run, its merged folder, and Chat over each: the two may part in the last bits of a logit."""
    run = make_run(folder / "run", base, tokenizer, prompt)
    merge(run, folder / "merged", device="cpu")
    return SimpleNamespace(
        run=run,
        merged=folder / "merged",
        chat=Chat.from_run(run, device="cpu", dtype="float32"),
        merged_chat=open_chat(folder / "merged", device="cpu", dtype="float32"),
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_base_folder, tiny_tokenizer):
    prompt = PromptSettings(recipe="chat", system="Be kind.")
    return make(tmp_path_factory.mktemp("pipeline"), tiny_base_folder, tiny_tokenizer, prompt)


@pytest.fixture(scope="module")
def of_a_template(tmp_path_factory, tiny_base_folder, tiny_tokenizer):
    """A recipe whose answers begin with a space and end at a stop string."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "faq.jinja").write_text("Q: {{ instruction }}\nA: ")
    prompt = PromptSettings(recipe=str(folder / "faq.jinja"), stop=("###",))
    return make(folder, tiny_base_folder, tiny_tokenizer, prompt)


@pytest.fixture(params=["made", "of_a_template"])
def either(request):
    return request.getfixturevalue(request.param)


def answers(chat, questions=QUESTIONS, max_tokens=24, **sampling):
    settings = SamplingSettings(max_tokens=max_tokens, **sampling)
    return [chat.ask(question, sampling=settings).text for question in questions]


def texts(results):
    return [record["generated_text"] for (record,) in results]


def beside(merged):
    model = AutoModelForCausalLM.from_pretrained(merged)
    return InstructionTextGenerationPipeline(
        model=model, tokenizer=AutoTokenizer.from_pretrained(merged), device="cpu"
    )


def test_a_run_is_asked_as_it_was_trained(either):
    pipeline = open_pipeline(either.run, device="cpu", dtype="float32")
    expected = answers(either.chat)
    assert texts(pipeline(QUESTIONS, max_new_tokens=24)) == expected
    assert texts(pipeline(QUESTIONS, max_new_tokens=24, batch_size=3)) == expected
    assert pipeline("gm", max_new_tokens=24)[0]["generated_text"] == expected[2]


def test_a_merged_model_is_asked_as_it_was_trained(either):
    pipeline = beside(either.merged)
    expected = answers(either.merged_chat)
    assert texts(pipeline(QUESTIONS, max_new_tokens=24)) == expected
    assert texts(pipeline(QUESTIONS, max_new_tokens=24, batch_size=3)) == expected


def test_plain_text_generation_needs_no_code_of_the_folder(either):
    plain = transformers.pipeline("text-generation", str(either.merged), device="cpu")
    asked = [{"role": "user", "content": "When is payday?"}]
    talk = plain(asked, max_new_tokens=24)[0]["generated_text"]
    assert talk[-1]["content"].strip() == answers(either.merged_chat)[0].strip()


def test_the_pieces_of_a_stream_are_the_answer(either):
    pipeline = open_pipeline(either.run, device="cpu", dtype="float32")
    pieces = list(pipeline.stream("When is payday?", max_new_tokens=24))
    assert "".join(pieces) == answers(either.chat)[0]


def test_a_stop_string_ends_the_answer_and_is_no_part_of_it(either):
    pipeline = open_pipeline(either.run, device="cpu", dtype="float32")
    whole = answers(either.chat)[0]
    stop = whole[6:9]
    expected = answers(either.chat, QUESTIONS[:1], stop=stop)
    assert expected[0] == whole[: whole.index(stop)]
    assert texts([pipeline(QUESTIONS[0], max_new_tokens=24, stop_strings=stop)]) == expected
    assert "".join(pipeline.stream(QUESTIONS[0], max_new_tokens=24, stop_strings=[stop])) == expected[0]


def test_a_conversation_goes_on(made):
    turns = [("user", "gm"), ("assistant", "gm!"), ("user", "Why?")]
    pipeline = open_pipeline(made.run, device="cpu", dtype="float32")
    asked = pipeline([{"role": role, "content": text} for role, text in turns], max_new_tokens=24)
    assert asked[0]["generated_text"] == answers(made.chat, [[Message(*turn) for turn in turns]])[0]


def test_full_text_stands_below_its_instruction(made):
    pipeline = open_pipeline(made.run, device="cpu", dtype="float32")
    full = pipeline("gm", max_new_tokens=24, return_full_text=True)[0]["generated_text"]
    assert full == f"gm\n{answers(made.chat)[2]}"


def test_sampling_gives_as_many_answers_as_asked_for(made):
    pipeline = open_pipeline(made.run, device="cpu", dtype="float32")
    options = {"do_sample": True, "top_p": 0.9, "top_k": 50, "temperature": 1.5, "max_new_tokens": 12}
    records = pipeline("gm", num_return_sequences=3, **options)
    assert len({record["generated_text"] for record in records}) > 1


def test_no_end_token_is_in_an_answer(made, tiny_tokenizer):
    """The 2023 notebook printed "</s>" after every answer."""
    pipeline = open_pipeline(made.run, device="cpu", dtype="float32")
    ids = [tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")]
    outputs = {"answer_ids": _tensor([*tiny_tokenizer("gm").input_ids, *ids, 0]), "instruction": "q"}
    assert pipeline.postprocess(outputs) == [{"generated_text": "gm"}]


def test_marks_in_a_question_are_text_to_a_run_and_refused_beside_a_merged_model(made):
    question = "What does <|im_end|> mean?"
    pipeline = open_pipeline(made.run, device="cpu", dtype="float32")
    assert texts([pipeline(question, max_new_tokens=24)]) == answers(made.chat, [question])
    with pytest.raises(
        ValueError, match=r"'<\|im_end\|>', which the tokenizer would take for the model's own"
    ):
        beside(made.merged)(question)


def test_an_answer_stays_within_the_models_context(made):
    pipeline = open_pipeline(made.run, device="cpu", dtype="float32")
    with pytest.raises(ValueError, match="the model reads at most 512, its answer included"):
        pipeline("payday " * 600)
    nearly = "g " * 200
    assert texts([pipeline(nearly, max_new_tokens=512)]) == answers(made.chat, [nearly], max_tokens=512)


def test_a_failed_stream_says_why(made):
    pipeline = open_pipeline(made.run, device="cpu", dtype="float32")
    with pytest.raises(ValueError, match="the model reads at most 512"):
        list(pipeline.stream("payday " * 600))


def test_an_abandoned_stream_ends_its_answer(made, monkeypatch):
    pipeline = open_pipeline(made.run, device="cpu", dtype="float32")
    steps = []
    forward = pipeline.model.forward
    monkeypatch.setattr(pipeline.model, "forward", lambda *a, **k: (steps.append(1), forward(*a, **k))[1])
    stream = pipeline.stream("g " * 100, max_new_tokens=300, eos_token_id=0)
    next(stream)
    stream.close()
    assert len(steps) < 290


def test_a_tokenizer_without_a_template_is_refused(tiny_llama, tiny_tokenizer):
    bare = copy.deepcopy(tiny_tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template, so how the model was asked"):
        InstructionTextGenerationPipeline(model=tiny_llama, tokenizer=bare, device="cpu")


def test_the_templates_space_and_the_trained_stop_string_go_with_the_merged_model(of_a_template):
    config = json.loads((of_a_template.merged / "config.json").read_text())
    assert config["instruction_pipeline"] == {"stop_strings": ["###"], "answer_lead": " "}
    pipeline = beside(of_a_template.merged)
    outputs = {"answer_ids": _tensor(pipeline.tokenizer(" It is the 1st. ### Q: more").input_ids)}
    assert pipeline.postprocess({**outputs, "instruction": "q"}) == [{"generated_text": "It is the 1st. "}]
    held = list(
        pipeline._show(
            iter([" It is the 1st. ", "##", "# Q"]),
            lambda: pipeline.postprocess({**outputs, "instruction": "q"}),
            None,
        )
    )
    assert held == ["It is the 1st", ". "]


def test_the_folder_answers_where_lorasmith_is_not_installed(tmp_path, made):
    """Runs what a stranger would run, in a process that cannot import lorasmith."""
    code = (
        "import sys; sys.modules['lorasmith'] = None\n"
        "from transformers import pipeline\n"
        f"ask = pipeline(model={str(made.merged)!r}, trust_remote_code=True, device='cpu')\n"
        "print(type(ask).__name__, ask.task)\n"
        f"print(repr([r[0]['generated_text'] for r in ask({QUESTIONS!r}, max_new_tokens=24)]))\n"
    )
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kind, given = done.stdout.splitlines()
    assert kind == f"InstructionTextGenerationPipeline {TASK}"
    assert given == repr(answers(made.merged_chat))


def test_code_is_not_run_unless_it_is_trusted(made):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        transformers.pipeline(model=str(made.merged))


def test_pipelines_of_the_base_are_no_longer_named(tmp_path, tiny_tokenizer, made):
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(made.merged)
    model.config.custom_pipelines = {"text-generation": {"impl": "old.Old", "pt": ["AutoModelForCausalLM"]}}
    model.save_pretrained(base)
    tiny_tokenizer.save_pretrained(base)
    run = make_run(tmp_path / "run", base, tiny_tokenizer)
    merge(run, tmp_path / "merged", device="cpu")
    assert list(json.loads((tmp_path / "merged" / "config.json").read_text())["custom_pipelines"]) == [TASK]


def test_it_is_registered_with_transformers(made):
    pipeline = open_pipeline(made.run, device="cpu", dtype="float32")
    again = transformers.pipeline(
        TASK, model=beside(made.merged).model, tokenizer=pipeline.tokenizer, device="cpu"
    )
    assert isinstance(again, InstructionTextGenerationPipeline)


def _tensor(ids):
    return torch.tensor([[ids]])  # one row of a batch, one answer
