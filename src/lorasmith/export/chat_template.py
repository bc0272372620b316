"""Write a prompt recipe as a chat template, for programs that know only the tokenizer."""

import json
from collections.abc import Sequence

from lorasmith.data.example import Message
from lorasmith.data.prompts import PromptRecipe
from lorasmith.data.templates import RECIPE_DATE


def chat_template(recipe: PromptRecipe) -> str:
    """Return Jinja source for ``tokenizer.chat_template`` that gives the recipe's prompt.

    The tokenizer's own template stays as it is unless the recipe adds a system prompt. Stop strings that are
    not tokens cannot be said in a template; they stay in lorasmith.json.
    """
    before, after = [], ""
    if recipe.system is not None:
        before += [
            "{% if messages[0]['role'] != 'system' %}",
            "{% set messages = [{'role': 'system', 'content': " + _quote(recipe.system) + "}] + messages %}",
            "{% endif %}",
        ]
    if recipe.name != "chat":
        before += [
            "{% set bos_token = " + _quote(recipe.bos_token) + " %}",
            "{% set eos_token = " + _quote(recipe.eos_token) + " %}",
            "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}",
            "{% set instruction = asked[-1]['content'] if asked else '' %}",
            "{% set input = asked[-1]['input'] or '' if asked else '' %}",
            "{% set told = messages | selectattr('role', 'equalto', 'system') | list %}",
            "{% set system = told[0]['content'] if told else '' %}",
            "{% set written %}",
        ]
        # A space before the answer is the answer's own: tokenizers keep it with the word after it.
        after = "{% endset %}{{ written.rstrip(' ') if add_generation_prompt else written }}"
    if "date_string" in recipe.template:  # Llama 3 prints today's date; training saw one fixed day
        before.insert(0, "{% set date_string = " + _quote(RECIPE_DATE.strftime("%d %b %Y")) + " %}")
    if before and recipe.template.startswith("\n"):
        # Keeps that line break; a statement would eat it, and llama.cpp knows no "+%}".
        before.append("{{ '' }}")
    return "".join(before) + recipe.template + after


def count_equal_prompts(recipe: PromptRecipe, tokenizer, questions: Sequence[Sequence[Message]]) -> int:
    """Return for how many questions plain ``tokenizer.apply_chat_template`` gives the recipe's very text."""
    return sum(
        _plain_prompt(tokenizer, q, recipe) == "".join(s.text for s in recipe.render_prompt(q))
        for q in questions
    )


def _plain_prompt(tokenizer, messages: Sequence[Message], recipe: PromptRecipe) -> str:
    turns = [{"role": m.role, "content": m.content} for m in messages]
    for turn, message in zip(turns, messages, strict=True):
        if message.input and "input" in recipe.template:
            turn["input"] = message.input
        elif message.input:
            turn["content"] = f"{message.content}\n\n{message.input}"
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def _quote(text: str) -> str:
    # A JSON string is a Jinja string too, but for \u escapes, which only control characters would get.
    return json.dumps(text, ensure_ascii=False)
