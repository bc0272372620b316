"""The losses are those of plain transformers, one row at a time, with the adapter on and off."""

import numpy as np
import pytest
import torch

from conftest import make_tiny_model
from lorasmith.data.prompts import choose_recipe
from lorasmith.data.settings import PromptSettings
from lorasmith.data.tokens import encode
from lorasmith.errors import DataError
from lorasmith.evaluation.perplexity import Surprise, answer_surprise, text_surprise
from lorasmith.evaluation.questions import ask
from lorasmith.generation.chat import Chat
from lorasmith.generation.sampling import SamplingSettings
from lorasmith.model.method_settings import LoraSettings
from lorasmith.model.methods import attach_adapter

ROWS = [
    ask("When is payday?", "On the 1st."),
    ask("When is the all hands?", "On Friday, at the end of the month."),
    ask("Hi", "Hello."),
]


@pytest.fixture(params=["llama", "gpt_neox"])
def chat(request, tiny_tokenizer):
    model = attach_adapter(make_tiny_model(request.param), LoraSettings(r=4), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    return Chat(model.eval(), tiny_tokenizer, choose_recipe(PromptSettings(), tiny_tokenizer)[0])


def plain_loss(model, ids, is_learnt):
    """The mean loss over learnt tokens by a plain forward."""
    with torch.no_grad():
        logits = model(torch.tensor([ids.tolist()])).logits[0, :-1]
    targets = torch.tensor(ids[1:].tolist())
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return losses[torch.tensor(is_learnt[1:].tolist())]


def test_losses_on_answers_are_those_of_a_plain_forward(chat):
    recipe, model = chat.recipe, chat._next_token.model
    encoded = [encode(recipe.render(row.as_example()), chat.tokenizer) for row in ROWS]
    tuned = torch.cat([plain_loss(model, *row) for row in encoded])
    with model.disable_adapter():
        base = torch.cat([plain_loss(model, *row) for row in encoded])
    for side, expected in ((chat, tuned), (chat.base(), base), (chat, tuned)):
        found = answer_surprise(side, ROWS)
        assert found.num_tokens == len(expected)
        assert found.loss == pytest.approx(expected.mean().item(), rel=1e-5)
        assert found.perplexity == pytest.approx(expected.mean().exp().item(), rel=1e-4)
    assert abs(base.mean() - tuned.mean()) > 0.05


def test_a_text_is_read_without_a_prompt(chat):
    passages = ["The office is in Saigon.", "Payday is the 1st."]
    ids = [np.array(chat.tokenizer(text).input_ids) for text in passages]
    expected = torch.cat([plain_loss(chat._next_token.model, i, np.ones(len(i), bool)) for i in ids])
    assert text_surprise(chat, passages).loss == pytest.approx(expected.mean().item(), rel=1e-5)


def test_the_chat_answers_afterwards_as_before(chat):
    sampling = SamplingSettings(max_tokens=8)
    before = chat.ask("When?", sampling=sampling).token_ids
    answer_surprise(chat.base(), ROWS)
    assert chat.ask("When?", sampling=sampling).token_ids == before


def test_a_row_beyond_the_context_is_named(chat):
    with pytest.raises(DataError, match="the model reads 512"):
        answer_surprise(chat, [ask("Why? " * 400, "x")])


def test_a_perplexity_may_be_beyond_all_numbers():
    assert Surprise(800.0, 3).perplexity == float("inf")
