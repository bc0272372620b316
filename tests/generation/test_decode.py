"""The loop is transformers' greedy generate, token by token; batches and kept caches change nothing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import make_tiny_model, watch_head
from lorasmith.data.prompts import choose_recipe
from lorasmith.data.settings import PromptSettings
from lorasmith.generation import decode as decode_module
from lorasmith.generation.chat import Chat
from lorasmith.generation.decode import (
    MAX_BATCH_TOKENS,
    NextToken,
    count_shared,
    group_by_beginning,
    plan_batches,
)
from lorasmith.generation.sampling import SamplingSettings

FAMILIES = ("llama", "mistral", "qwen", "gpt_neox")
QUESTIONS = (
    "When is payday?",
    "Hi",
    "Where is the office? " * 6,
    "Hi",
    "How do I get my tokens?",
    "You are a helpful assistant. " * 3,
    "Below is an instruction",
)
# Letters that random models write sooner or later: answers end at different lengths.
SOON = SamplingSettings(max_tokens=30, stop=("A", "s", "u", "q", "}|"))


@pytest.fixture(params=FAMILIES)
def chat(request, tiny_tokenizer):
    recipe, _ = choose_recipe(PromptSettings(recipe="chat"), tiny_tokenizer)
    return Chat(make_tiny_model(request.param), tiny_tokenizer, recipe)


@pytest.fixture
def reads(monkeypatch):
    """The (rows, tokens) of every forward, as they happen."""
    seen: list[tuple[int, int]] = []
    original = NextToken.__call__

    def call(self, input_ids, *args, **kwargs):
        seen.append(tuple(input_ids.shape))
        return original(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(NextToken, "__call__", call)
    return seen


def generate(chat, prompt_ids, max_tokens):
    ids = torch.tensor([prompt_ids])
    whole = chat._next_token.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False
    )
    return tuple(whole[0, len(prompt_ids) :].tolist())


@pytest.mark.parametrize("question", QUESTIONS[:3])
def test_greedy_is_transformers_generate(chat, question):
    answer = chat.ask(question, sampling=SamplingSettings(max_tokens=40))
    assert answer.token_ids == generate(chat, chat.encode_prompt(question), 40)


@pytest.mark.parametrize(
    "sampling", [SOON, SamplingSettings(max_tokens=12, temperature=1, top_p=0.9, seed=5)]
)
@pytest.mark.parametrize("batch_size", [3, 32])
def test_a_batch_answers_as_one_by_one(chat, sampling, batch_size):
    together = chat.ask_many(QUESTIONS, sampling=sampling, batch_size=batch_size)
    alone = [chat.ask(question, sampling=sampling) for question in QUESTIONS]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert [(a.text, a.finish_reason, a.prompt_tokens) for a in together] == [
        (a.text, a.finish_reason, a.prompt_tokens) for a in alone
    ]
    assert len({a.completion_tokens for a in alone}) > 1 or not sampling.stop  # rows did leave at odd times


def test_sharing_the_common_beginning_changes_no_token(chat, monkeypatch):
    shared = chat.ask_many(QUESTIONS, sampling=SOON)
    monkeypatch.setattr(decode_module, "MIN_SHARED_TOKENS", 1000)
    assert [a.token_ids for a in shared] == [a.token_ids for a in chat.ask_many(QUESTIONS, sampling=SOON)]


@pytest.mark.parametrize("chat", ["llama"], indirect=True)
def test_finished_rows_leave_the_batch_and_shared_tokens_are_read_once(chat, reads):
    answers = chat.ask_many(QUESTIONS, sampling=SOON)
    prompts = [chat.encode_prompt(question) for question in QUESTIONS]
    shared = count_shared(prompts)
    assert shared >= 4
    lengths = [answer.completion_tokens for answer in answers]
    steps = [(sum(n > step for n in lengths), 1) for step in range(1, max(lengths))]
    assert reads == [(1, shared), (len(prompts), max(map(len, prompts)) - shared), *steps]


def test_the_head_gets_the_last_states_as_a_tensor_of_their_own(chat):
    """A view of them is multiplied by a copy of the head for every row."""
    given = watch_head(chat._next_token.model)
    chat.ask_many(QUESTIONS, sampling=SOON)
    assert max(states.shape[0] for states in given) == len(QUESTIONS)
    assert all(states.shape[1] == 1 and states.is_contiguous() for states in given)


@pytest.mark.parametrize("chat", ["llama"], indirect=True)
def test_the_next_turn_reads_only_what_is_new(chat, reads):
    question = "Where is the office? " * 6
    first = chat.ask(question, sampling=SamplingSettings(max_tokens=9))
    assert reads[0] == (1, first.prompt_tokens)
    reads.clear()
    again = chat.ask(question, sampling=SamplingSettings(max_tokens=9))
    assert reads[0] == (1, 1)
    assert again.token_ids == first.token_ids


def test_a_kept_beginning_changes_no_token(chat):
    sampling = SamplingSettings(max_tokens=20)
    warm = [chat.ask(question, sampling=sampling).token_ids for question in QUESTIONS]
    cold = []
    for question in QUESTIONS:
        chat._kept.cache = None
        cold.append(chat.ask(question, sampling=sampling).token_ids)
    assert warm == cold


def test_an_answer_stopped_half_way_or_two_at_once_spoil_nothing(chat):
    sampling = SamplingSettings(max_tokens=15)
    expected = [chat.ask(question, sampling=sampling).text for question in QUESTIONS[:2]]
    stopped = chat.stream(QUESTIONS[0], sampling=sampling)
    next(stopped)
    stopped.close()
    first, second = (chat.stream(question, sampling=sampling) for question in QUESTIONS[:2])
    texts = ["", ""]
    for one, other in zip(first, second, strict=False):
        texts[0] += one.text
        texts[1] += other.text
    texts[0] += "".join(piece.text for piece in first)
    texts[1] += "".join(piece.text for piece in second)
    assert texts[0] == expected[0]
    assert expected[1].startswith(texts[1])  # zip drops a piece of the longer stream
    assert [chat.ask(question, sampling=sampling).text for question in QUESTIONS[:2]] == expected


@pytest.mark.parametrize("chat", ["llama"], indirect=True)
def test_an_interrupt_inside_a_forward_leaves_no_half_written_cache(chat, monkeypatch):
    sampling = SamplingSettings(max_tokens=15)
    expected = chat.ask(QUESTIONS[0], sampling=sampling).token_ids
    layer = chat._next_token.model.model.layers[1]
    calls = []

    def interrupt(*_):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt

    hook = layer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        chat.ask(QUESTIONS[0], sampling=sampling)
    hook.remove()
    assert chat.ask(QUESTIONS[0], sampling=sampling).token_ids == expected


def test_a_model_in_training_answers_without_dropout_and_stays_in_training(chat):
    model = chat._next_token.model
    expected = chat.ask("Hi", sampling=SamplingSettings(max_tokens=8)).token_ids
    model.train()
    frozen = next(part for part in model.modules() if not list(part.children()))
    frozen.eval()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.9
    assert chat.ask("Hi", sampling=SamplingSettings(max_tokens=8)).token_ids == expected
    assert model.training
    assert not frozen.training


def test_batches_are_bounded_in_rows_and_tokens_and_hold_every_row_once():
    lengths = [10, MAX_BATCH_TOKENS, 7, 300, 9, MAX_BATCH_TOKENS // 2 + 1, 8]
    batches = plan_batches(lengths, batch_size=3)
    assert sorted(row for rows in batches for row in rows) == list(range(len(lengths)))
    for rows in batches:
        assert len(rows) <= 3
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= MAX_BATCH_TOKENS
    assert [len(rows) for rows in batches] == [1, 1, 3, 2]


@pytest.mark.parametrize(
    ("sequences", "expected"),
    [([[1, 2, 3]], 3), ([[1, 2], [1, 2, 3]], 2), ([[1, 2, 3], [1, 9], [1, 2, 4]], 1), ([[5], [6]], 0)],
)
def test_the_common_beginning(sequences, expected):
    assert count_shared(sequences) == expected


def test_prompts_are_grouped_by_documents_that_are_worth_it():
    system, doc, other = [7] * 30, [1] * 200, [2] * 200
    prompts = [
        *([*system, *doc, 90 + i] for i in range(5)),
        [*system, 50],
        *([*system, *other, 90 + i] for i in range(5)),
        [*system, 51, 52],
    ]
    groups = sorted(sorted(group) for group in group_by_beginning(prompts))
    assert groups == [[0, 1, 2, 3, 4], [5, 11], [6, 7, 8, 9, 10]]
    assert group_by_beginning([[*system, i] for i in range(9)]) == [list(range(9))]
    assert group_by_beginning([]) == []


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), max_size=20))
def test_every_prompt_is_in_one_group(prompts):
    prompts = [prompt * 20 for prompt in prompts]
    assert sorted(row for group in group_by_beginning(prompts) for row in group) == list(range(len(prompts)))


def test_answers_do_not_depend_on_the_groups(chat, monkeypatch):
    document = "The office is in Saigon. " * 3
    questions = [f"{document}When {i}?" for i in range(4)] + ["Hi", f"{document[:40]} Where?"]
    together = chat.ask_many(questions, sampling=SOON)
    monkeypatch.setattr(decode_module, "MIN_SAVED_TOKENS", 20)
    assert len(group_by_beginning([chat.encode_prompt(q) for q in questions])) > 1
    assert [a.token_ids for a in chat.ask_many(questions, sampling=SOON)] == [a.token_ids for a in together]
