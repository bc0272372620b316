"""ChatLorasmith and ChatOpenAI pass LangChain's standard suites, and ChatLorasmith gives Chat's answers."""

import json
from types import SimpleNamespace

import pytest
import torch
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from conftest import make_tiny_model
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
