"""The official client asks a real server; every answer is the one that Chat gives alone."""

import httpx
import openai
import pytest

from lorasmith.generation.sampling import SamplingSettings
from serve.conftest import ADAPTERS, open_service, serving

QUESTION = [{"role": "user", "content": "When is payday?"}]


@pytest.fixture(scope="module")
def service(tiny_base_folder, adapters):
    return open_service(tiny_base_folder, adapters)


@pytest.fixture(scope="module")
def url(service):
    with serving(service) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models_are_listed_with_their_parent(client):
    assert [(model.id, model.parent) for model in client.models.list()] == [
        *((name, "tiny") for name in ADAPTERS),
        ("tiny", None),
    ]
    assert client.models.retrieve("beta").id == "beta"


@pytest.mark.parametrize("model", [*ADAPTERS, "tiny"])
def test_a_chat_completion_is_what_chat_answers(client, lone_chats, model):
    reply = client.chat.completions.create(model=model, messages=QUESTION, max_tokens=20)
    alone = lone_chats[model].ask("When is payday?", sampling=SamplingSettings(max_tokens=20))
    choice = reply.choices[0]
    assert (choice.message.content, choice.finish_reason) == (alone.text, alone.finish_reason)
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (
        alone.prompt_tokens,
        alone.completion_tokens,
    )
    assert reply.model == model


def test_a_stream_is_the_same_answer_in_parts(client, lone_chats):
    chunks = list(
        client.chat.completions.create(
            model="alpha",
            messages=QUESTION,
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    alone = lone_chats["alpha"].ask("When is payday?", sampling=SamplingSettings(max_tokens=20))
    assert chunks[0].choices[0].delta.role == "assistant"
    parts = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(part.delta.content or "" for part in parts) == alone.text
    assert [part.finish_reason for part in parts if part.finish_reason] == [alone.finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == alone.prompt_tokens + alone.completion_tokens


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match=r"There is no model 'delta' here\. Served are: alpha,"):
        client.chat.completions.create(model="delta", messages=QUESTION)


def test_health_and_metrics_are_open(url, client):
    client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=2)
    assert httpx.get(f"{url}/health").json()["status"] == "ok"
    page = httpx.get(f"{url}/metrics").text
    assert 'lorasmith_requests_total{model="tiny",status="200"}' in page
    assert "lorasmith_rows_running 0.0" in page
