"""Say a prompt recipe as an Ollama Modelfile.

Ollama's templates are Go's. A recipe whose text is always

    head  question  after-question  answer  after-answer  question  after-question ...

is written over all messages; one that shows a single question over that question. How Ollama reads it is in its
``parser/parser.go`` and ``template/template.go``.
"""

import re

from lorasmith.data.example import Message
from lorasmith.data.prompts import PromptRecipe
from lorasmith.errors import ExportError, RecipeError

_QUESTION, _ANSWER, _SYSTEM = "\ue000", "\ue001", "\ue002"  # private use: in no template


def make_modelfile(
    recipe: PromptRecipe, gguf: str, adapter: str | None = None, *, added_bos: str = ""
) -> str:
    """Return the Modelfile for a GGUF file beside it: FROM, TEMPLATE, stop parameters, greedy sampling.

    ``added_bos``: what Ollama puts before every prompt by itself, since the file says so.

    Raises:
        ExportError: the template or a stop text cannot be quoted in a Modelfile.
    """
    lines = [f"FROM {gguf}"] + ([f"ADAPTER {adapter}"] if adapter else [])
    lines += [f'TEMPLATE """{_quotable(go_template(recipe, added_bos))}"""', "PARAMETER temperature 0"]
    lines += ["PARAMETER repeat_penalty 1"]  # Ollama took 1.1 where none was said, until August 2026
    stops = dict.fromkeys((*recipe.end_tokens(), *recipe.stop))
    return "\n".join(lines + [f"PARAMETER stop {_quote(stop)}" for stop in stops]) + "\n"


def go_template(recipe: PromptRecipe, added_bos: str = "") -> str:
    """Return the Go template that renders what ``recipe`` does, before the answer; ``added_bos`` is left out."""

    def text(*messages: Message) -> str:
        return "".join(part.text for part in recipe.render_prompt(messages)).removeprefix(added_bos)

    user, answer = Message("user", _QUESTION), Message("assistant", _ANSWER)
    pieces = text(user).split(_QUESTION)
    single = "{{ .Prompt }}".join(map(_literal, pieces))
    try:
        talk = text(user, answer, user)
    except RecipeError:  # a template for one question
        return single
    # Where the template writes a space before an answer, the model writes it, and Ollama hands it back with the answer.
    start = f"{_QUESTION.join(pieces)}{recipe.answer_lead()}{_ANSWER}"
    head, after = pieces[0], pieces[-1]
    end = f"{_QUESTION}{after}"
    if len(pieces) != 2 or not (talk.startswith(start) and talk.endswith(end)):
        return single
    between = talk[len(start) : len(talk) - len(end)]
    opening = _literal(head)
    try:
        told = text(Message("system", _SYSTEM), user)
        before, rest = told.split(_SYSTEM)
        if not rest.endswith(end):
            raise ValueError
    except (RecipeError, ValueError):
        pass  # the recipe has no place for a system prompt
    else:
        is_told = '{{ if eq (index .Messages 0).Role "system" }}'
        then = f"{_literal(before)}{{{{ (index .Messages 0).Content }}}}{_literal(rest[: -len(end)])}"
        opening = f"{is_told}{then}{{{{ else }}}}{opening}{{{{ end }}}}"
    turns = (
        f'{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{{{{ .Content }}}}{_literal(after)}'
        f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{_literal(between)}{{{{ end }}}}{{{{ end }}}}'
    )
    return opening + turns


def _literal(text: str) -> str:
    return re.sub(r"\{{2,}|\{$", lambda braces: f'{{{{ "{braces[0]}" }}}}', text)


def _quote(text: str) -> str:
    """Quote for a Modelfile, which knows no escapes: line breaks and backslashes stand as they are."""
    return f'"""{_quotable(text)}"""' if '"' in text else f'"{text}"'


def _quotable(text: str) -> str:
    if '"""' in text:
        raise ExportError(f'{text!r:.200} holds """, which a Modelfile cannot quote.')
    return text
