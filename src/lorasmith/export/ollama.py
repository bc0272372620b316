"""Say a prompt recipe as an Ollama Modelfile.

Ollama's templates are Go's. A recipe whose text is always

    head  question  after-question  answer  after-answer  question  after-question ...

is written over all messages; one that shows a single question (Alpaca's) over that question.
"""

from lorasmith.data.example import Message
from lorasmith.data.prompts import PromptRecipe
from lorasmith.errors import ExportError, RecipeError

_QUESTION, _ANSWER, _SYSTEM = "\ue000", "\ue001", "\ue002"  # private use: in no template


def make_modelfile(recipe: PromptRecipe, gguf: str, adapter: str | None = None) -> str:
    """Return the Modelfile for a GGUF file beside it: FROM, TEMPLATE, stop parameters, greedy sampling.

    Raises:
        ExportError: the template cannot be quoted in a Modelfile.
    """
    template = go_template(recipe)
    if '"""' in template:
        raise ExportError('The prompt template holds """, which a Modelfile cannot quote.')
    lines = [f"FROM {gguf}"] + ([f"ADAPTER {adapter}"] if adapter else [])
    lines += [f'TEMPLATE """{template}"""', "PARAMETER temperature 0"]
    stops = dict.fromkeys((*recipe.end_tokens(), *recipe.stop))
    return "\n".join(lines + [f"PARAMETER stop {_quote(stop)}" for stop in stops]) + "\n"


def go_template(recipe: PromptRecipe) -> str:
    """Return the Go template that renders what ``recipe`` does, before the answer."""
    user, answer = Message("user", _QUESTION), Message("assistant", _ANSWER)
    head, after = _text(recipe, user).split(_QUESTION)
    talk = _text(recipe, user, answer, user)
    start = f"{head}{_QUESTION}{after}{_ANSWER}"
    end = f"{_QUESTION}{after}"
    if not (talk.startswith(start) and talk.endswith(end)):
        return f"{_literal(head)}{{{{ .Prompt }}}}{_literal(after)}"
    between = talk[len(start) : len(talk) - len(end)]
    opening = _literal(head)
    try:
        told = _text(recipe, Message("system", _SYSTEM), user)
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


def _text(recipe: PromptRecipe, *messages: Message) -> str:
    return "".join(segment.text for segment in recipe.render_prompt(messages))


def _literal(text: str) -> str:
    return text.replace("{{", '{{ "{{" }}')


def _quote(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
