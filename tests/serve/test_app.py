"""The official client asks a real server; every answer is the one that Chat gives alone."""

import json
import threading

import httpx2
import openai
import pytest

from lorasmith.generation.sampling import SamplingSettings
from lorasmith.serve.keys import Keys
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
    assert httpx2.get(f"{url}/health").json()["status"] == "ok"
    page = httpx2.get(f"{url}/metrics").text
    assert 'lorasmith_requests_total{model="tiny",status="200"}' in page
    assert "lorasmith_rows_running 0.0" in page


def ask(client, model="tiny", **options):
    return client.chat.completions.create(
        **{"model": model, "messages": QUESTION, "max_tokens": 12, **options}
    )


def test_a_seed_repeats_an_answer_and_choices_differ(client, lone_chats):
    wild = {"temperature": 1.2, "top_p": 0.95, "seed": 3}
    reply = ask(client, "alpha", n=3, **wild)
    texts = [choice.message.content for choice in reply.choices]
    alone = [
        lone_chats["alpha"].ask(
            "When is payday?",
            sampling=SamplingSettings(max_tokens=12, temperature=1.2, top_p=0.95, seed=3 + choice),
        )
        for choice in range(3)
    ]
    assert texts == [answer.text for answer in alone]
    assert len(set(texts)) > 1
    assert reply.usage.prompt_tokens == alone[0].prompt_tokens
    assert reply.usage.completion_tokens == sum(answer.completion_tokens for answer in alone)


def test_stop_strings_end_an_answer(client):
    text = ask(client, max_tokens=30).choices[0].message.content
    stop = text[3]
    choice = ask(client, max_tokens=30, stop=[stop]).choices[0]
    assert choice.message.content == text[: text.index(stop)]
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_the_models(client, lone_chats, stream):
    import torch

    reply = ask(client, "beta", max_tokens=6, logprobs=True, top_logprobs=3, stream=stream)
    choices = [chunk.choices[0] for chunk in reply] if stream else [reply.choices[0]]
    told = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    chat = lone_chats["beta"]
    prompt = chat.encode_prompt("When is payday?")
    ids = chat.ask("When is payday?", sampling=SamplingSettings(max_tokens=6)).token_ids
    with chat.answering() as model, torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(dim=-1)
    assert [token.logprob for token in told] == pytest.approx(
        [float(row[token_id]) for row, token_id in zip(expected, ids, strict=True)], abs=1e-4
    )
    for token, row in zip(told, expected, strict=True):
        assert [top.logprob for top in token.top_logprobs] == pytest.approx(
            row.topk(3).values.tolist(), abs=1e-4
        )


def test_a_text_completion_asks_by_the_recipe_and_raw_text_goes_as_it_is(client, lone_chats):
    alone = lone_chats["gamma"].ask("When is payday?", sampling=SamplingSettings(max_tokens=12))
    by_recipe = client.completions.create(model="gamma", prompt="When is payday?", max_tokens=12, logprobs=2)
    assert by_recipe.choices[0].text == alone.text
    assert by_recipe.usage.prompt_tokens == alone.prompt_tokens
    probabilities = by_recipe.choices[0].logprobs
    assert "".join(probabilities.tokens) == alone.text
    assert probabilities.text_offset[1] == len(probabilities.tokens[0])
    written = "<|im_start|>user\nWhen is payday?<|im_end|>\n<|im_start|>assistant\n"
    raw = client.completions.create(
        model="gamma", prompt=written, max_tokens=12, extra_body={"raw": True}, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in raw) == alone.text
    both = client.completions.create(model="gamma", prompt=["Hi", "When is payday?"], max_tokens=12)
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[1].text == alone.text


SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["first", "second"]}},
    "required": ["ok", "kind"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_answer_follows_a_json_schema(client, temperature):
    wanted = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": SCHEMA, "strict": True}}
    choice = ask(
        client, "alpha", max_tokens=60, response_format=wanted, temperature=temperature, seed=1
    ).choices[0]
    assert choice.finish_reason == "stop"
    value = json.loads(choice.message.content)
    assert value.keys() == {"ok", "kind"}
    assert value["kind"] in ("first", "second")


def test_a_row_held_to_a_schema_leaves_the_others_alone(client, lone_chats):
    wanted = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": SCHEMA}}
    alone = lone_chats["alpha"].ask("When is payday?", sampling=SamplingSettings(max_tokens=60)).text
    texts = []
    threads = [
        threading.Thread(target=lambda o=options: texts.append(ask(client, "alpha", max_tokens=60, **o)))
        for options in [{}, {"response_format": wanted}] * 3
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers = [reply.choices[0].message.content for reply in texts]
    assert answers.count(alone) == 3
    assert sum(json.loads(text).keys() == {"ok", "kind"} for text in answers if text != alone) == 3


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "nonsense"}, "nonsense"),
        ({"$ref": "http://elsewhere.example/schema"}, "does not fetch resources"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "NoExtensionBias"),
        ({"minimum": 5, "maximum": 3, "type": "integer"}, "Unsatisfiable schema"),
    ],
)
def test_a_schema_that_cannot_be_held_to_is_refused(client, schema, why):
    wanted = {"type": "json_schema", "json_schema": {"name": "v", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match=rf"the schema cannot be used: .*{why}"):
        ask(client, response_format=wanted)


def test_token_ids_go_as_they_are_and_must_be_the_models(client, lone_chats):
    ids = lone_chats["gamma"].encode_prompt("When is payday?")
    by_recipe = client.completions.create(model="gamma", prompt="When is payday?", max_tokens=12)
    both = client.completions.create(model="gamma", prompt=[ids[:3], ids], max_tokens=12)
    assert both.choices[1].text == by_recipe.choices[0].text
    vocabulary = lone_chats["gamma"]._next_token.model.config.vocab_size
    for wrong in (vocabulary, -1, 10**30):
        with pytest.raises(openai.BadRequestError, match=f"is not between 0 and {vocabulary - 1}"):
            client.completions.create(model="gamma", prompt=[1, wrong])
    with pytest.raises(openai.BadRequestError, match="The prompt is empty"):
        client.completions.create(model="gamma", prompt=[])


REFUSED = [
    ({"temperature": 3}, "temperature=3"),
    ({"temperature": "hot"}, "temperature: Input should be a valid number"),
    ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools is not supported"),
    ({"max_tokens": 99_999}, r"max_tokens is 99999; this server writes at most 2048\."),
    ({"n": 99}, "99 answers to each of 1 prompts; this server gives at most 8"),
    ({"stop": [""]}, "a stop string is empty"),
    ({"stop": ["a"] * 17}, "There are 17 stop strings; this server looks for at most 16"),
    ({"top_logprobs": 3}, "top_logprobs needs logprobs: true"),
    ({"extra_body": {"temprature": 1}}, "temprature is unknown to this server. Did you mean temperature"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        r"messages\.0\.content\.0\.type: Input should be 'text'",
    ),
    ({"messages": []}, "messages: Tuple should have at least 1 item"),
    ({"messages": [{"role": "tool", "content": "x"}]}, r"messages\.0\.role: Input should be"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "must end with a user's message"),
    ({"messages": [{"role": "user", "content": " "}]}, "The question is empty"),
    (
        {"messages": [{"role": "user", "content": "far " * 600}]},
        r"The question has \d+ tokens .* at most 512",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_done_is_refused_by_name(client, options, message):
    with pytest.raises(openai.BadRequestError, match=message) as told:
        ask(client, **options)
    assert told.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 3),
        ("top_p", 0),
        ("seed", -1),
        ("max_tokens", 0),
        ("max_tokens", 99_999),
        ("max_completion_tokens", 0),
        ("max_completion_tokens", 99_999),
    ],
)
def test_a_wrong_value_is_told_with_its_name_beside_it(client, name, value):
    with pytest.raises(openai.BadRequestError) as told:
        client.chat.completions.create(model="tiny", messages=QUESTION, **{name: value})
    assert told.value.param == name


def test_what_changes_nothing_is_let_through(client):
    plain = ask(client).choices[0].message.content
    neutral = {"frequency_penalty": 0, "user": "me", "tools": [], "logit_bias": {}, "tool_choice": "auto"}
    assert ask(client, **neutral).choices[0].message.content == plain
    assert ask(client, max_tokens=None, max_completion_tokens=12).choices[0].message.content == plain
    parts = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "When is "}, {"type": "text", "text": "payday?"}],
        }
    ]
    assert ask(client, messages=parts).choices[0].message.content == plain


def test_an_answer_may_be_sent_back_as_it_came(client):
    reply = ask(client).choices[0].message
    told = [
        ask(client, messages=[*QUESTION, said, *QUESTION]).choices[0].message.content
        for said in ({"role": "assistant", "content": reply.content}, reply, reply.model_dump())
    ]
    assert told == told[:1] * 3


def post(url, content, path="/v1/chat/completions", **headers):
    return httpx2.post(
        url + path, content=content, headers={"Content-Type": "application/json", **headers}, timeout=30
    )


def test_bodies_that_are_none_are_refused(url, service):
    assert post(url, b"{").status_code == 400
    assert "The request is no JSON" in post(url, b"{").json()["error"]["message"]
    assert post(url, b"[1]").json()["error"]["message"] == "The request is no JSON object."
    assert post(url, b"[" * 100_000).status_code == 400
    half = post(url, b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}')
    assert (half.status_code, half.json()["error"]["type"]) == (400, "invalid_request_error")
    assert post(url, b'{"temperature": NaN}').status_code == 400
    too_large = post(url, b" " * (service.settings.max_request_bytes + 1))
    assert (too_large.status_code, too_large.json()["error"]["code"]) == (413, "request_too_large")
    assert httpx2.post(url + "/v1/chat/completions", content=b"{}").status_code == 415
    assert httpx2.get(url + "/v1/other").json()["error"]["code"] == "unknown_url"
    assert httpx2.get(url + "/v1/chat/completions").status_code == 405
    assert httpx2.get(url + "/health", headers={"Host": "evil.example"}).status_code == 400


def test_a_defect_is_told_in_openais_shape(tiny_base_folder, monkeypatch, caplog):
    service = open_service(tiny_base_folder, {})
    monkeypatch.setattr(service, "find_model", lambda name: {}[name])
    with serving(service) as url:
        reply = post(url, b'{"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}')
    assert (reply.status_code, reply.json()["error"]["type"]) == (500, "server_error")
    assert "KeyError: 'tiny'" in caplog.text


def test_a_key_opens_the_door_and_nothing_else_does(tiny_base_folder, caplog):
    key = "k" * 20
    with serving(open_service(tiny_base_folder, {}), keys=Keys([key, "other" * 4])) as url:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": key},
            {"Authorization": "Bearer"},
        ):
            reply = httpx2.get(f"{url}/v1/models", headers=headers)
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
        with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["tiny"]
        stranger = openai.OpenAI(base_url=f"{url}/v1", api_key="no", max_retries=0)
        with stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        assert httpx2.get(f"{url}/health").status_code == 200
    assert key not in caplog.text
