"""Answers from the handbook's own passages: loaded, indexed here, found by likeness, put before the question.

python examples/langchain/retrieval.py smollm2-135m "When do I get paid?"
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from langchain_core.document_loaders import BaseLoader
from langchain_core.documents import Document
from langchain_core.language_models import BaseChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore, VectorStore
from ngrams import NGramEmbeddings

from lorasmith.evaluation.questions import read_evaluation_rows
from lorasmith.langchain import ChatLorasmith

HANDBOOK = Path(__file__).parents[1] / "handbook" / "handbook_train.json"
PROMPT = ChatPromptTemplate.from_messages(
    [("human", "Answer the question from these notes only.\n\n{notes}\n\nQuestion: {question}")]
)


class QuestionLoader(BaseLoader):
    """Loads each question with its answer from a data file of any format that lorasmith trains on."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def lazy_load(self) -> Iterator[Document]:
        for row in read_evaluation_rows(self.file):
            yield Document(f"{row.question}\n{row.reference}", metadata={"source": row.where})


def index(file: Path) -> VectorStore:
    """Return an index of the file in memory; nothing leaves this machine."""
    return InMemoryVectorStore.from_documents(QuestionLoader(file).load(), NGramEmbeddings())


def make_chain(model: BaseChatModel, store: VectorStore, *, num_notes: int = 3) -> Runnable[str, str]:
    """Return a chain from a question to an answer out of the ``num_notes`` passages most like it."""
    notes = store.as_retriever(search_kwargs={"k": num_notes}) | _join
    return {"notes": notes, "question": RunnablePassthrough()} | PROMPT | model | StrOutputParser()


def _join(documents: list[Document]) -> str:
    return "\n\n".join(document.page_content for document in documents)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a run folder or a base's name; with --server one of its names")
    parser.add_argument("question")
    parser.add_argument("--data", type=Path, default=HANDBOOK)
    parser.add_argument("--server", help="http://127.0.0.1:8000/v1")
    given = parser.parse_args(words)
    store = index(given.data)
    print(make_chain(ChatLorasmith(model=given.model, base_url=given.server), store).invoke(given.question))
    for document in store.similarity_search(given.question, k=3):
        print(f"  {document.metadata['source']}")


if __name__ == "__main__":
    main()
