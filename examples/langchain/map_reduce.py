"""A question to a document that is longer than the model's context: a note from each part, an answer from the notes.

pip install langchain-text-splitters
python examples/langchain/map_reduce.py smollm2-135m handbook.md "What does the company pay for?"
"""

import argparse
from pathlib import Path

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda
from langchain_text_splitters import RecursiveCharacterTextSplitter

from lorasmith.langchain import ChatLorasmith

PROMPT = ChatPromptTemplate.from_messages([("human", "{text}\n\nFrom this text only: {question}")])


def make_chain(model: ChatLorasmith, *, part_tokens: int) -> Runnable[dict[str, str], str]:
    """Return a chain from {"document", "question"} to an answer.

    No part is longer than ``part_tokens``. A note has at most a quarter of them, so the notes of a round are
    shorter than what they are made from, until they fit into one part.
    """
    splitter = RecursiveCharacterTextSplitter(
        chunk_size=part_tokens, chunk_overlap=0, length_function=model.get_num_tokens
    )
    answer = PROMPT | model.bind(max_tokens=part_tokens // 4) | StrOutputParser()

    def reduce(asked: dict[str, str]) -> str:
        parts = splitter.split_text(asked["document"])
        if not parts:
            raise ValueError("The document is empty.")
        notes = answer.batch([{"text": part, "question": asked["question"]} for part in parts])
        if len(notes) == 1:
            return notes[0]
        return reduce({**asked, "document": "\n\n".join(notes)})

    return RunnableLambda(reduce)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a run folder or a base's name")
    parser.add_argument("document", type=Path)
    parser.add_argument("question")
    parser.add_argument("--part-tokens", type=int, default=1000, help="half of the context, or less")
    given = parser.parse_args(words)
    chain = make_chain(ChatLorasmith(model=given.model), part_tokens=given.part_tokens)
    document = given.document.read_text(encoding="utf-8")
    print(chain.invoke({"document": document, "question": given.question}))


if __name__ == "__main__":
    main()
