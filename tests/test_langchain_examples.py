"""Each example in examples/langchain runs as it stands, and its chain does what it says."""

import runpy
from pathlib import Path

import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.runnables import RunnableLambda

from export.test_merge import make_run
from lorasmith.data.settings import PromptSettings
from lorasmith.evaluation.facts import has_keywords
from lorasmith.evaluation.questions import read_evaluation_rows
from lorasmith.langchain import ChatLorasmith

EXAMPLES = Path(__file__).parents[1] / "examples"
HANDBOOK = EXAMPLES / "handbook" / "handbook_train.json"
SUPPORT = EXAMPLES / "chat" / "support.jsonl"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_base_folder, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("runs")
    short = PromptSettings(recipe="chat", stop=("p",))  # the letter that untrained answers are full of
    return [str(make_run(folder / name, tiny_base_folder, tiny_tokenizer, short)) for name in ("one", "two")]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "langchain")
    return lambda name: runpy.run_path(str(EXAMPLES / "langchain" / f"{name}.py"))


def test_there_is_a_test_for_each():
    names = {file.stem for file in (EXAMPLES / "langchain").glob("*.py")}
    assert names == {"prompt_pipe", "retrieval", "router", "map_reduce", "ngrams"}


def test_prompt_pipe(example, runs, capsys):
    example("prompt_pipe")["main"]([runs[0], "payday"])
    asked = ChatLorasmith(model=runs[0]).invoke("What should a newcomer know about payday?")
    assert capsys.readouterr().out == f"{asked.content}\n"


def test_retrieval_puts_the_right_passages_before_the_question(example):
    retrieval = example("retrieval")
    store = retrieval["index"](HANDBOOK)
    rows = read_evaluation_rows(EXAMPLES / "handbook" / "handbook_eval_ordinary.json")
    found = [store.similarity_search(row.question, k=3) for row in rows]
    right = [
        any(has_keywords(row.keywords, document.page_content) for document in documents)
        for row, documents in zip(rows, found, strict=True)
    ]
    assert sum(right) >= 57  # of 60

    seen = []
    model = FakeListChatModel(responses=["On the 1st."])
    chain = retrieval["make_chain"](_note(model, seen), store)
    assert chain.invoke(rows[0].question) == "On the 1st."
    (prompt,) = seen
    assert all(document.page_content in prompt for document in found[0])
    assert prompt.endswith(f"Question: {rows[0].question}")


def test_retrieval_runs(example, runs, tmp_path, capsys):
    (tmp_path / "faq.jsonl").write_text('{"instruction": "When is payday?", "output": "On the 1st."}\n')
    example("retrieval")["main"]([runs[0], "payday?", "--data", str(tmp_path / "faq.jsonl")])
    assert capsys.readouterr().out.endswith("\n  faq.jsonl:1\n")


def test_router_asks_each_adapter_what_it_was_taught(example, runs, capsys):
    one, two = runs
    router = example("router")
    routes = ["--route", one, str(HANDBOOK), "--route", two, str(SUPPORT)]
    for question, model in (("How large is the learning stipend?", one), ("My chain slips.", two)):
        router["main"]([question, *routes])
        answer = ChatLorasmith(model=model).invoke(question).content
        assert capsys.readouterr().out == f"[{model}]\n{answer}\n"


def test_map_reduce_reads_a_document_longer_than_the_context(example, runs, tmp_path, capsys):
    file = tmp_path / "long.txt"
    file.write_text("\n\n".join(f"Rule {i}: the office is in Saigon." for i in range(60)))
    model = ChatLorasmith(model=runs[0])
    assert model.get_num_tokens(file.read_text()) > model.chat.max_context
    example("map_reduce")["main"]([runs[0], str(file), "Where is the office?", "--part-tokens", "200"])
    assert capsys.readouterr().out.endswith("\n")


def test_map_reduce_leaves_nothing_out(example, runs):
    class Told(ChatLorasmith):
        def _stream(self, messages, stop=None, run_manager=None, **kwargs):
            seen.append(messages[0].content)
            yield from super()._stream(messages, stop, run_manager, **{**kwargs, "max_tokens": 3})

    seen = []
    model = Told(model=runs[0])
    chain = example("map_reduce")["make_chain"](model, part_tokens=200)
    chain.invoke({"document": "\n\n".join(f"Rule {i:02}." for i in range(90)), "question": "What?"})
    assert all(any(f"Rule {i:02}." in text for text in seen) for i in range(90))
    assert len(seen) > 2
    with pytest.raises(ValueError, match="The document is empty"):
        chain.invoke({"document": "", "question": "What?"})


def _note(model, seen):
    """Return the model behind a step that writes down what it is asked."""
    return RunnableLambda(lambda prompt: (seen.append(prompt.to_string()), prompt)[1]) | model
