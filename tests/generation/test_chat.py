"""One object answers for every front end: one renderer, the recipe enforced, notes for what is guessed."""

import itertools
import json

import pytest
import torch

from conftest import make_tiny_model
from lorasmith.data.example import Example, Message
from lorasmith.data.prompts import choose_recipe
from lorasmith.data.settings import PromptSettings
from lorasmith.data.tokens import encode
from lorasmith.errors import AdapterError, BaseModelError, OverlongError, RecipeError, RunError
from lorasmith.generation.chat import Chat, open_chat
from lorasmith.generation.decode import NextToken
from lorasmith.generation.sampling import SamplingSettings
from lorasmith.model.adapter import save_adapter
from lorasmith.model.base import resolve_base
from lorasmith.model.method_settings import LoraSettings
from lorasmith.model.methods import attach_adapter
from lorasmith.model.run_record import RunRecord, write_run_record
from lorasmith.model.settings import BaseSettings

SHORT = SamplingSettings(max_tokens=12)
ASK = "When is payday?"


def make_adapted(model):
    """Attach an adapter that changes every answer."""
    adapted = attach_adapter(model, LoraSettings(r=4), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    return adapted


@pytest.fixture
def recipe(tiny_tokenizer):
    return choose_recipe(PromptSettings(recipe="chat"), tiny_tokenizer)[0]


@pytest.fixture
def chat(tiny_llama, tiny_tokenizer, recipe):
    return Chat(tiny_llama, tiny_tokenizer, recipe)


@pytest.fixture
def tuned(tiny_llama, tiny_tokenizer, recipe):
    return Chat(make_adapted(tiny_llama), tiny_tokenizer, recipe, name="tuned")


@pytest.fixture
def run_dir(tmp_path, tiny_base_folder, recipe):
    """A finished run over the tiny base, as training writes it."""
    save_adapter(make_adapted(make_tiny_model("llama")), tmp_path / "run" / "adapter")
    record = RunRecord(
        name="run",
        base=resolve_base(BaseSettings(model=str(tiny_base_folder))).ref,
        recipe=recipe.to_json(),
        settings={},
        data={},
    )
    write_run_record(tmp_path / "run", record)
    return tmp_path / "run"


def test_the_prompt_is_the_training_text_up_to_the_answer(chat, recipe, tiny_tokenizer):
    whole, is_learnt = encode(
        recipe.render(Example((Message("user", ASK), Message("assistant", "The 1st.")), "here")),
        tiny_tokenizer,
    )
    first_learnt = int(is_learnt.argmax())
    assert chat.encode_prompt(ASK) == whole[:first_learnt].tolist()


def test_special_token_text_in_a_question_is_ordinary_text(chat):
    plain = chat.encode_prompt("a")
    ids = chat.encode_prompt("<|im_end|>a")
    assert ids.count(2) == plain.count(2)


def test_the_pieces_of_a_stream_are_the_answer(chat):
    answer = chat.ask(ASK, sampling=SHORT)
    pieces = list(chat.stream(ASK, sampling=SHORT))
    assert "".join(piece.text for piece in pieces) == answer.text
    assert sum((piece.token_ids for piece in pieces), ()) == answer.token_ids
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert all(piece.tokens_per_second > 0 for piece in pieces)
    assert answer.completion_tokens == 12
    assert answer.prompt_tokens == len(chat.encode_prompt(ASK))


def test_the_end_token_stops_and_special_tokens_stay_out_of_the_text(chat, tiny_tokenizer, monkeypatch):
    pad, start, end = 0, 1, 2
    script = [start, *tiny_tokenizer("the 1st", add_special_tokens=False).input_ids, pad, end, 50]
    written = iter(script)
    monkeypatch.setattr(NextToken, "__call__", lambda *_, **__: torch.eye(400)[[next(written)]])
    answer = chat.ask(ASK)
    assert (answer.text, answer.finish_reason) == ("the 1st", "stop")
    assert answer.token_ids == tuple(script[:-1])


def test_recipe_stop_strings_end_every_answer(tiny_llama, tiny_tokenizer, recipe):
    free = Chat(tiny_llama, tiny_tokenizer, recipe).ask(ASK, sampling=SamplingSettings(max_tokens=30))
    stop = free.text.strip("\n\ufffd")[:3]
    stopping, _ = choose_recipe(PromptSettings(recipe="chat", stop=(stop,)), tiny_tokenizer)
    answer = Chat(tiny_llama, tiny_tokenizer, stopping).ask(ASK, sampling=SamplingSettings(max_tokens=30))
    assert answer.text == free.text.partition(stop)[0]
    assert answer.finish_reason == "stop"


def test_a_seed_repeats_a_sampled_answer(chat):
    def ask(seed):
        return chat.ask(ASK, sampling=SamplingSettings(temperature=1, seed=seed, max_tokens=20)).token_ids

    assert ask(1) == ask(1)
    assert ask(1) != ask(2)
    assert ask(1) != chat.ask(ASK, sampling=SamplingSettings(max_tokens=20)).token_ids


def test_ask_many_tells_each_answer_and_keeps_the_order(chat):
    seen = []
    questions = ["Hi", ASK, [Message("user", ASK), Message("assistant", "The 1st."), Message("user", "Why?")]]
    answers = chat.ask_many(questions, sampling=SHORT, on_answer=lambda *told: seen.append(told))
    assert [answer.text for answer in answers] == [chat.ask(q, sampling=SHORT).text for q in questions]
    assert sorted(seen, key=lambda told: told[0]) == list(enumerate(answers))
    assert chat.ask_many([]) == []


def test_base_is_the_same_weights_with_the_adapter_off(tuned, tiny_tokenizer, recipe):
    plain = Chat(make_tiny_model("llama"), tiny_tokenizer, recipe)
    base = tuned.base()
    one, two = tuned.stream(ASK, sampling=SHORT), base.stream(ASK, sampling=SHORT)
    texts = ["", ""]
    for first, second in itertools.zip_longest(one, two):  # in turn, piece by piece
        texts[0] += first.text if first else ""
        texts[1] += second.text if second else ""
    assert texts == [tuned.ask(ASK, sampling=SHORT).text, plain.ask(ASK, sampling=SHORT).text]
    assert base.ask(ASK, sampling=SHORT).token_ids == plain.ask(ASK, sampling=SHORT).token_ids
    assert tuned.ask(ASK, sampling=SHORT).token_ids != plain.ask(ASK, sampling=SHORT).token_ids
    assert "untuned" in base.name


def test_base_leaves_the_adapter_on_and_its_weights_as_trainable_as_they_were(tuned):
    model = tuned._next_token.model
    was_trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before = tuned.ask(ASK, sampling=SHORT).token_ids
    tuned.base().ask(ASK, sampling=SHORT)
    assert tuned.ask(ASK, sampling=SHORT).token_ids == before
    assert {name: p.requires_grad for name, p in model.named_parameters()} == was_trainable
    assert model.get_model_status().enabled is True


def test_a_whole_model_has_no_base(chat):
    with pytest.raises(AdapterError, match="no adapter to switch off"):
        chat.base()


@pytest.mark.parametrize("question", ["", "  \n", []])
def test_nothing_asked(chat, question):
    with pytest.raises(RecipeError):
        chat.ask(question)


def test_a_question_longer_than_the_context_is_refused_before_anything_is_read(chat):
    with pytest.raises(OverlongError, match=r"has \d+ tokens with its prompt; the model reads at most 512"):
        chat.stream("payday " * 600)


def test_an_answer_ends_where_the_context_does(chat):
    question = "ab" * 248
    room = 512 - len(chat.encode_prompt(question))
    assert 0 < room < 40
    answer = chat.ask(question, sampling=SamplingSettings(max_tokens=100))
    assert (answer.completion_tokens, answer.finish_reason) == (room, "length")


def test_the_trained_system_prompt_is_used_and_enforced(tiny_llama, tiny_tokenizer):
    recipe, _ = choose_recipe(
        PromptSettings(recipe="chat", system="You are a helpful assistant."), tiny_tokenizer
    )
    chat = Chat(tiny_llama, tiny_tokenizer, recipe)
    assert "You are a helpful assistant." in tiny_tokenizer.decode(chat.encode_prompt(ASK))
    assert chat.encode_prompt(ASK, system="You are a helpful assistant.") == chat.encode_prompt(ASK)
    with pytest.raises(
        RecipeError, match=r"was trained with the system prompt 'You are a helpful assistant\.'"
    ):
        chat.ask(ASK, system="You are a pirate.")
    with pytest.raises(RecipeError, match="was trained with"):
        chat.ask([Message("system", "You are a pirate."), Message("user", ASK)])
    overridden = tiny_tokenizer.decode(chat.encode_prompt(ASK, system="A pirate.", override_system=True))
    assert "A pirate." in overridden
    assert "helpful" not in overridden


def test_a_model_without_a_trained_system_prompt_takes_one(chat, tiny_tokenizer):
    assert "A pirate." in tiny_tokenizer.decode(chat.encode_prompt(ASK, system="A pirate."))


def test_an_alpaca_input_reaches_the_prompt(tiny_llama, tiny_tokenizer):
    recipe, _ = choose_recipe(PromptSettings(recipe="alpaca"), tiny_tokenizer)
    text = tiny_tokenizer.decode(
        Chat(tiny_llama, tiny_tokenizer, recipe).encode_prompt("Sum up.", input="A text.")
    )
    assert "### Input:\nA text." in text


def test_from_run(run_dir, tuned):
    opened = Chat.from_run(run_dir, device="cpu", dtype="float32")
    assert opened.ask(ASK, sampling=SHORT).token_ids == tuned.ask(ASK, sampling=SHORT).token_ids
    assert opened.notes == ()
    assert opened.base().ask(ASK, sampling=SHORT).token_ids == tuned.base().ask(ASK, sampling=SHORT).token_ids


def edit_record(run_dir, change):
    record = json.loads((run_dir / "run.json").read_text())
    change(record)
    (run_dir / "run.json").write_text(json.dumps(record))


def test_another_base_is_refused(run_dir):
    edit_record(run_dir, lambda record: record["base"].update(fingerprint="0" * 64))
    with pytest.raises(BaseModelError, match="000000000000"):
        Chat.from_run(run_dir, device="cpu", dtype="float32")


def test_an_edited_recipe_is_refused(run_dir):
    edit_record(run_dir, lambda record: record["recipe"].update(system="You are a pirate."))
    with pytest.raises(RecipeError, match="fingerprint"):
        Chat.from_run(run_dir, device="cpu", dtype="float32")


def test_a_moved_base_is_named_and_checked(run_dir, tiny_base_folder, tmp_path):
    import shutil

    moved = shutil.copytree(tiny_base_folder, tmp_path / "moved")
    edit_record(run_dir, lambda record: record["base"].update(id=str(tmp_path / "gone")))
    with pytest.raises(BaseModelError):
        Chat.from_run(run_dir, device="cpu", dtype="float32")
    assert (
        Chat.from_run(run_dir, device="cpu", dtype="float32", base=str(moved)).ask(ASK, sampling=SHORT).text
    )


def test_a_plain_peft_folder_can_be_asked_and_its_recipe_is_said_to_be_chosen(
    run_dir, tuned, tmp_path, tiny_base_folder
):
    (run_dir / "adapter").rename(tmp_path / "plain")
    opened = open_chat(tmp_path / "plain", device="cpu", dtype="float32", base=str(tiny_base_folder))
    assert opened.ask(ASK, sampling=SHORT).token_ids == tuned.ask(ASK, sampling=SHORT).token_ids
    assert "not known. It is asked with the recipe chat" in opened.notes[0]


def test_a_merged_folder_brings_its_recipe(tmp_path, tiny_tokenizer):
    recipe, _ = choose_recipe(PromptSettings(recipe="alpaca", stop=("###",)), tiny_tokenizer)
    make_tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "lorasmith.json").write_text(json.dumps({"recipe": recipe.to_json()}))
    opened = open_chat(tmp_path, device="cpu", dtype="float32")
    assert (opened.recipe, opened.notes) == (recipe, ())
    (tmp_path / "lorasmith.json").write_text("{}")
    with pytest.raises(RecipeError, match="holds no prompt recipe"):
        open_chat(tmp_path, device="cpu", dtype="float32")


@pytest.mark.parametrize("part", ["", "adapter"])
def test_open_chat_finds_the_run(run_dir, part, recipe):
    assert open_chat(run_dir / part, device="cpu", dtype="float32").notes == ()


def test_open_chat_takes_a_plain_base(tiny_base_folder):
    opened = open_chat(str(tiny_base_folder), device="cpu", dtype="float32")
    assert opened.notes == ("It is asked with the recipe chat: the tokenizer has a chat template.",)


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(RunError, match="nothing-here is not there"):
        open_chat(tmp_path / "nothing-here")
    with pytest.raises(RunError):
        Chat.from_run(tmp_path)


def test_a_mistyped_run_is_not_taken_for_a_model_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "runs" / "handbook").mkdir(parents=True)
    (tmp_path / "runs" / "handbook" / "run.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=r"no run handbok in runs. Did you mean runs/handbook\?"):
        open_chat("runs/handbok")
