"""Two adapters, each asked what it was taught: a question goes to the one whose training questions are most like it.

python examples/langchain/router.py "Is the frame under warranty?" \\
    --route runs/handbook examples/handbook/handbook_train.json \\
    --route runs/chat examples/chat/support.jsonl
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import Runnable, RunnableLambda
from langchain_core.vectorstores import InMemoryVectorStore
from ngrams import NGramEmbeddings

from lorasmith.evaluation.questions import read_evaluation_rows
from lorasmith.langchain import ChatLorasmith


def learn_routes(taught: Mapping[str, Path]) -> Callable[[str], str]:
    """Return a function from a question to the model that was taught the question most like it.

    ``taught`` gives each model's training data.
    """
    documents = [
        Document(turn.content, metadata={"model": model})
        for model, file in taught.items()
        for row in read_evaluation_rows(file)
        for turn in row.asked
        if turn.role == "user"
    ]
    store = InMemoryVectorStore.from_documents(documents, NGramEmbeddings())
    return lambda question: store.similarity_search(question, k=1)[0].metadata["model"]


def make_router(model: ChatLorasmith, route: Callable[[str], str]) -> Runnable[str, str]:
    """Return a chain that asks the model to which ``route`` sends the question.

    On a server the models share one base; in this process each is loaded whole when it is first asked.
    """
    return RunnableLambda(lambda question: model.bind(model=route(question))) | StrOutputParser()


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question")
    parser.add_argument("--route", nargs=2, action="append", required=True, metavar=("MODEL", "DATA"))
    parser.add_argument("--server", help="http://127.0.0.1:8000/v1")
    given = parser.parse_args(words)
    taught = {name: Path(file) for name, file in given.route}
    route = learn_routes(taught)
    print(f"[{route(given.question)}]")
    model = ChatLorasmith(model=next(iter(taught)), base_url=given.server)
    print(make_router(model, route).invoke(given.question))


if __name__ == "__main__":
    main()
