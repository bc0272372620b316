"""A prompt, a tuned model and a parser in one pipe, streamed.

python examples/langchain/prompt_pipe.py runs/handbook "the learning stipend"
"""

import argparse

from langchain_core.language_models import BaseChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable

from lorasmith.langchain import ChatLorasmith

PROMPT = ChatPromptTemplate.from_messages([("human", "What should a newcomer know about {topic}?")])


def make_pipe(model: BaseChatModel) -> Runnable[dict[str, str], str]:
    return PROMPT | model | StrOutputParser()


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a run folder; with --server one of its names")
    parser.add_argument("topic")
    parser.add_argument("--server", help="http://127.0.0.1:8000/v1")
    given = parser.parse_args(words)
    pipe = make_pipe(ChatLorasmith(model=given.model, base_url=given.server))
    for piece in pipe.stream({"topic": given.topic}):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
