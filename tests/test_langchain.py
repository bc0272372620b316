"""ChatLorasmith and ChatOpenAI pass LangChain's standard suites, and ChatLorasmith gives Chat's answers."""

import json
from types import SimpleNamespace

import pytest
import torch
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from conftest import make_tiny_model
from export.test_merge import make_run
from lorasmith.data.example import Message
from lorasmith.data.settings import PromptSettings
from lorasmith.errors import EndpointError, RecipeError, RunError, SettingsError
from lorasmith.generation.chat import Chat
from lorasmith.generation.sampling import SamplingSettings
from lorasmith.langchain import ChatLorasmith
from serve.conftest import open_service, serving

ANSWER = {"setup": "gm", "punchline": "gm gm"}
OPENINGS = [
    "Hello",
    "hi",
    "Tell me a joke about cats.",
    "Tell me a joke about cats. Return the result as a JSON with 'setup' and 'punchline' keys. "
    "Return nothing other than JSON.",
    "Write me 2 haikus. Only include the haikus.",
    "how are you",
    "When is payday?",
]

here = SimpleNamespace()  # what the suites' properties, which get no fixtures, are told


@pytest.fixture(scope="session")
def talker_folder(tmp_path_factory, tiny_tokenizer):
    """A tiny model that was taught to answer anything with one short JSON object, and to stop."""
    torch.manual_seed(0)
    model = make_tiny_model("llama").train()
    answer = [*tiny_tokenizer(json.dumps(ANSWER)).input_ids, tiny_tokenizer.eos_token_id]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(120):
        asked = tiny_tokenizer.apply_chat_template(
            [{"role": "user", "content": OPENINGS[step % len(OPENINGS)]}], add_generation_prompt=True
        )["input_ids"]
        ids = torch.tensor([[*asked, *answer]])
        labels = ids.clone()
        labels[:, : len(asked)] = -100
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("talker") / "talker"
    model.eval().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def served(talker_folder):
    """A server for the talker, once as the base and once more under an adapter that changes nothing."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    idle = talker_folder.parent / "idle"
    model = AutoModelForCausalLM.from_pretrained(talker_folder)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(idle)
    here.folder = str(talker_folder)
    with serving(open_service(talker_folder, {"idle": idle})) as url:
        here.url = f"{url}/v1"
        yield here.url


class InProcess:
    chat_model_class = ChatLorasmith
    has_structured_output = False  # a server's

    @property
    def chat_model_params(self):
        return {"model": here.folder, "device": "cpu", "dtype": "float32"}

    @property
    def model_override_value(self):
        return str(here.folder) + "/."


class Served:
    chat_model_class = ChatLorasmith
    has_structured_output = True
    supports_json_mode = True
    model_override_value = "idle"

    @property
    def chat_model_params(self):
        return {"model": "tiny", "base_url": here.url}


class OfOpenAI:
    chat_model_class = ChatOpenAI
    # The server refuses tools by name; answers that keep to a schema it has.
    has_tool_calling = False
    has_tool_choice = False
    has_structured_output = True
    supports_json_mode = True
    structured_output_kwargs = {"method": "json_schema"}  # noqa: RUF012
    model_override_value = "idle"

    @property
    def chat_model_params(self):
        settings = {"temperature": 0, "stream_usage": True}
        return {"model": "tiny", "base_url": here.url, "api_key": "none", **settings}


class TestInProcessUnit(InProcess, ChatModelUnitTests):
    init_from_env_params = ({"LORASMITH_API_KEY": "a key"}, {"model": "x"}, {"api_key": "a key"})


class Brief:
    @property
    def chat_model_params(self):
        return {**super().chat_model_params, "max_tokens": 64}


class TestInProcess(Brief, InProcess, ChatModelIntegrationTests): ...


class TestServedUnit(Served, ChatModelUnitTests): ...


class TestServed(Brief, Served, ChatModelIntegrationTests): ...


# langchain-openai's own: it puts the parsed answer where OpenAI's value declares none.
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings:UserWarning")
@pytest.mark.filterwarnings("ignore:Received a Pydantic BaseModel V1 schema:UserWarning")
class TestChatOpenAI(Brief, OfOpenAI, ChatModelIntegrationTests):
    @pytest.mark.xfail(reason="ChatOpenAI asks for a tool where the schema is a class of Pydantic 1")
    def test_structured_output_pydantic_2_v1(self, model):
        super().test_structured_output_pydantic_2_v1(model)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_base_folder, tiny_tokenizer):
    """A run whose recipe has a system prompt."""
    prompt = PromptSettings(recipe="chat", system="Be kind.")
    return make_run(tmp_path_factory.mktemp("kind") / "kind", tiny_base_folder, tiny_tokenizer, prompt)


@pytest.fixture(scope="module")
def tuned(run):
    return ChatLorasmith(model=str(run), device="cpu", dtype="float32", max_tokens=16)


@pytest.fixture(scope="module")
def chat(run):
    return Chat.from_run(run, device="cpu", dtype="float32")


def test_it_gives_the_answer_of_chat(tuned, chat):
    expected = chat.ask("When is payday?", sampling=SamplingSettings(max_tokens=16))
    answer = tuned.invoke("When is payday?")
    assert answer.content == expected.text
    assert answer.usage_metadata["input_tokens"] == expected.prompt_tokens
    assert answer.usage_metadata["output_tokens"] == len(expected.token_ids)
    assert answer.response_metadata["finish_reason"] == expected.finish_reason
    assert "".join(piece.content for piece in tuned.stream("When is payday?")) == expected.text


def test_a_conversation_and_the_settings_of_one_call(tuned, chat):
    turns = [("user", "gm"), ("assistant", "gm!"), ("user", "Why?")]
    sampling = SamplingSettings(max_tokens=9, temperature=1.5, seed=7, stop=("e",))
    expected = chat.ask([Message(*turn) for turn in turns], sampling=sampling).text
    asked = [HumanMessage("gm"), AIMessage([{"type": "text", "text": "gm!"}]), HumanMessage("Why?")]
    assert tuned.invoke(asked, max_tokens=9, temperature=1.5, seed=7, stop=["e"]).content == expected


def test_a_lone_stop_string_of_one_call_is_one(tuned, chat):
    text = chat.ask("gm", sampling=SamplingSettings(max_tokens=16)).text
    pairs = [text[place : place + 2] for place in range(len(text) - 1)]
    stop = next(pair for pair in pairs if text.index(pair) > min(map(text.index, pair)))
    assert tuned.invoke("gm", stop=stop).content == text[: text.index(stop)]


def test_the_trained_system_prompt_is_held_and_can_be_overridden(tuned, run):
    asked = [SystemMessage("Be rude."), HumanMessage("gm")]
    with pytest.raises(RecipeError, match=r"trained with the system prompt 'Be kind\.'"):
        tuned.invoke(asked)
    free = ChatLorasmith(model=str(run), device="cpu", dtype="float32", max_tokens=4, override_system=True)
    assert free.invoke(asked).usage_metadata["output_tokens"] > 0


def test_tokens_are_counted_by_the_models_own_tokenizer(tuned, tiny_tokenizer):
    assert tuned.get_token_ids("When is payday?") == tiny_tokenizer("When is payday?").input_ids


@pytest.mark.parametrize(
    ("ask", "error", "text"),
    [
        (lambda m: m.invoke([ToolMessage("4", tool_call_id="1")]), RecipeError, "kind 'tool'"),
        (lambda m: m.invoke([HumanMessage([{"type": "image", "url": "x"}])]), RecipeError, "reads text only"),
        (lambda m: m.invoke("gm", logit_bias={}), SettingsError, "does not know: logit_bias"),
        (lambda m: m.invoke("gm", top_p=7), SettingsError, "top_p"),
        (lambda m: m.with_structured_output({}), SettingsError, "come from a server only"),
        (lambda m: m.invoke("gm", model="/no/such/run"), RunError, "no/such/run"),
    ],
)
def test_what_it_cannot_do_is_refused_in_words(tuned, ask, error, text):
    with pytest.raises(error, match=text):
        ask(tuned)


def test_a_servers_faults_are_told(served):
    served_model = ChatLorasmith(model="tiny", base_url=served, max_retries=0)
    with pytest.raises(EndpointError, match="refused with 404"):
        served_model.invoke("gm", model="nobody")
    with pytest.raises(EndpointError, match=r"Connection error\. Is the server running"):
        ChatLorasmith(model="tiny", base_url="http://127.0.0.1:9/v1", max_retries=0).invoke("gm")
    with pytest.raises(SettingsError, match="custom_get_token_ids"):
        served_model.get_num_tokens("gm")
    with pytest.raises(SettingsError, match="not in this process"):
        served_model.chat  # noqa: B018
    with pytest.raises(SettingsError, match="there are json_schema, function_calling, json_mode"):
        served_model.with_structured_output({}, method="magic")


def test_a_fault_in_the_middle_of_an_answer_is_told(talker_folder):
    service = open_service(talker_folder, {})
    tokens = iter(range(3))

    def fail(*_):
        if next(tokens, None) is None:
            raise RuntimeError("out of memory")

    service.models.model.register_forward_pre_hook(fail)
    with serving(service) as url:
        model = ChatLorasmith(model="tiny", base_url=f"{url}/v1")
        with pytest.raises(EndpointError, match=r"did not finish its answer: .* computed: out of memory"):
            model.invoke("gm")


def test_an_answer_has_the_keys_of_its_schema_only(served):
    schema = {
        "title": "Thing",
        "type": "object",
        "properties": {"type": {"enum": ["gm"]}, "more": {"type": "object", "properties": {}}},
        "required": ["type"],
    }
    model = ChatLorasmith(model="tiny", base_url=served, max_tokens=64)
    assert set(model.with_structured_output(schema).invoke("hi")) <= {"type", "more"}
    (sent,) = [
        step.kwargs["response_format"]["json_schema"]["schema"]
        for step in model.with_structured_output(schema).steps
        if hasattr(step, "kwargs")
    ]
    assert sent["additionalProperties"] is sent["properties"]["more"]["additionalProperties"] is False
    assert set(sent["properties"]) == {"type", "more"}
