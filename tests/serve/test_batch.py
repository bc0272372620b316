"""Whoever shares the batch, an answer is the one that Chat over PEFT's own model gives alone."""

import random

import pytest
import torch

from conftest import make_tiny_model, watch_head
from lorasmith.data.prompts import choose_recipe
from lorasmith.data.settings import PromptSettings
from lorasmith.generation.chat import Chat
from lorasmith.generation.sampling import SamplingSettings
from lorasmith.serve.adapters import _AdaptedLinear
from lorasmith.serve.batch import Batch, Row
from lorasmith.serve.models import open_models
from lorasmith.serve.slots import SlotCache

QUESTIONS = (
    "When is payday?",
    "Hi",
    "Where is the office? " * 6,
    "You are a helpful assistant. " * 3,
    "Below is an instruction",
)
SETTINGS = (
    SamplingSettings(max_tokens=20),
    SamplingSettings(max_tokens=12, stop=("A", "s", "u", "}|")),
    SamplingSettings(max_tokens=9, temperature=1.0, top_p=0.9, seed=5),
)


def make_batch(model, **limits):
    return Batch(
        model, **{"max_rows": 5, "cache_tokens": 4096, "kept_tokens": 1024, "chunk_tokens": 40, **limits}
    )


def make_row(chat, adapter, question, sampling, parts):
    prompt = chat.encode_prompt(question)
    return Row(prompt, adapter, sampling, chat.new_writer(prompt, sampling), parts.append)


def run(batch, rows):
    """Answer ``rows`` in order, as the scheduler does."""
    waiting = list(rows)
    sizes = []
    while waiting or len(batch):
        batch.join(lambda: waiting[0] if waiting else None, lambda: waiting.pop(0))
        if batch.reading:
            batch.read()
            batch.leave()
        sizes.append(len(batch))
        if batch.writing:
            batch.write()
        batch.leave()
    return sizes


_alone = {}


def answer_alone(chats, name, question, sampling):
    """PEFT takes its time, and both runs of a test ask the same."""
    if (name, question, sampling) not in _alone:
        _alone[name, question, sampling] = chats[name].ask(question, sampling=sampling)
    return _alone[name, question, sampling]


@pytest.fixture(scope="module")
def models(tiny_base_folder, adapters):
    return open_models(
        list(adapters.items()), base=str(tiny_base_folder), base_name="tiny", device="cpu", dtype="float32"
    )


@pytest.mark.parametrize("kept_tokens", [0, 1024])
def test_a_mixed_batch_answers_as_each_alone(models, lone_chats, kept_tokens):
    dice = random.Random(1)
    asked = [
        (model, question, sampling)
        for model in models.list()
        for question in QUESTIONS
        for sampling in SETTINGS
    ]
    dice.shuffle(asked)
    parts = [[] for _ in asked]
    rows = [
        make_row(model.chat, model.adapter, question, sampling, told)
        for (model, question, sampling), told in zip(asked, parts, strict=True)
    ]
    batch = make_batch(models.model, kept_tokens=kept_tokens)
    sizes = run(batch, rows)
    assert max(sizes) == 5
    for (model, question, sampling), row, told in zip(asked, rows, parts, strict=True):
        alone = answer_alone(lone_chats, model.name, question, sampling)
        assert tuple(row.writer.token_ids) == alone.token_ids, (model.name, question, sampling)
        assert "".join(part.text for part in told) == alone.text
        assert [token.id for part in told for token in part.tokens] == list(alone.token_ids)
        assert told[-1].finish_reason == alone.finish_reason
    answers = {
        tuple(row.writer.token_ids)
        for row, (_, q, s) in zip(rows, asked, strict=True)
        if (q, s) == (QUESTIONS[0], SETTINGS[0])
    }
    assert len(answers) == 4  # each adapter, and the base, says something else
    if kept_tokens:
        assert sum(row.shared for row in rows) > 0.5 * sum(len(row.prompt_ids) for row in rows)
    assert batch._cache.num_slots == 0  # an idle server holds no keys but the kept ones
    assert batch.beginnings.num_tokens <= kept_tokens


def test_adapters_that_were_laid_half_way_are_laid_anew(models, lone_chats, monkeypatch):
    batch = make_batch(models.model)

    def ask(name):
        model, told = models.find(name), []
        run(batch, [make_row(model.chat, model.adapter, QUESTIONS[0], SETTINGS[0], told)])
        return "".join(part.text for part in told)

    answers = {name: answer_alone(lone_chats, name, QUESTIONS[0], SETTINGS[0]).text for name in lone_chats}
    assert ask("alpha") == answers["alpha"]
    paths = []

    def lay(layer, path, adapters):
        paths.append(path)
        if len(paths) == 5:
            raise MemoryError
        whole(layer, path, adapters)

    whole = _AdaptedLinear.lay
    monkeypatch.setattr(_AdaptedLinear, "lay", lay)
    with pytest.raises(MemoryError):
        ask("beta")
    batch.drop()
    assert {name: ask(name) for name in ("beta", "alpha")} == {
        name: answers[name] for name in ("beta", "alpha")
    }


@pytest.mark.parametrize("family", ["mistral", "qwen", "gpt_neox"])
def test_other_models_answer_as_transformers_generate(family, tiny_tokenizer):
    model = make_tiny_model(family)
    recipe, _ = choose_recipe(PromptSettings(recipe="chat"), tiny_tokenizer)
    chat = Chat(model, tiny_tokenizer, recipe)
    rows = [make_row(chat, None, question, SETTINGS[0], []) for question in QUESTIONS * 2]
    run(make_batch(model), rows)
    for row in rows:
        ids = torch.tensor([row.prompt_ids])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        assert row.writer.token_ids == whole[0, len(row.prompt_ids) :].tolist()


def test_the_head_gets_the_last_states_as_a_tensor_of_their_own(tiny_tokenizer):
    """A view of them is multiplied by a copy of the head for every row."""
    recipe, _ = choose_recipe(PromptSettings(recipe="chat"), tiny_tokenizer)
    chat = Chat(make_tiny_model("llama"), tiny_tokenizer, recipe)
    given = watch_head(chat._next_token.model)
    rows = [make_row(chat, None, question, SETTINGS[0], []) for question in QUESTIONS]
    run(make_batch(chat._next_token.model, chunk_tokens=400), rows)
    assert max(states.shape[0] for states in given) == len(QUESTIONS)
    assert all(states.shape[1] == 1 and states.is_contiguous() for states in given)


def test_slots_grow_for_those_who_will_come_and_not_beyond():
    cache = SlotCache(2, max_slots=6, max_tokens=3000)
    sizes = []
    for num_rows, num_columns in ((1, 20), (2, 20), (3, 20), (5, 20), (6, 20), (4, 600), (5, 255)):
        cache.make_room(num_rows, num_columns)
        sizes.append((cache.num_slots, cache.num_columns))
    # Longer rows than all slots have memory for: fewer slots, and no more columns than that memory holds.
    assert sizes == [(2, 256), (2, 256), (6, 256), (6, 256), (6, 256), (4, 750), (5, 256)]


def test_many_short_rows_hold_no_more_than_the_memory_there_is():
    cache = SlotCache(2, max_slots=32, max_tokens=1600)
    for num_rows in range(1, 33):
        cache.make_room(num_rows, 44)
        assert cache.num_slots >= num_rows
        assert cache.num_columns > 44
        assert cache.num_slots * cache.num_columns <= 1600
