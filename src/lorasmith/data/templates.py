"""Compile Jinja templates as transformers compiles chat templates: sandboxed, same filters and globals.

A chat template from the Hub is a program that somebody else wrote, so it runs in an immutable sandbox.
"""

import functools
import json
from collections.abc import Mapping, MutableMapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorasmith.errors import RecipeError

# The date that a template gets when it asks for today's. One fixed day, the fallback that Llama 3's own
# template names: the same rows must give the same tokens tomorrow, in training, asking and the cache.
RECIPE_DATE = datetime(2024, 7, 26)


class _GenerationBlock(jinja2.ext.Extension):
    """Lets ``{% generation %}`` blocks through: they mark what transformers learns, and print their body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    def make_globals(self, d: MutableMapping[str, Any] | None) -> MutableMapping[str, Any]:
        # A plain dict: jinja2's chain of maps is copied for each render, and that was a fifth of its time.
        return {**self.globals, **(d or {})}


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent=None, separators=None, sort_keys: bool = False
) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@functools.lru_cache(maxsize=32)
def compile_template(source: str) -> jinja2.Template:
    """Compile ``source`` in the sandbox.

    Raises:
        RecipeError: the source is not a Jinja template; names the line.
    """
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = RECIPE_DATE.strftime
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise RecipeError(
            f"The prompt template is not valid Jinja: line {error.lineno}: {error.message}. "
            "Mend the template, or use --recipe chat or --recipe alpaca."
        ) from error
    except (RecursionError, SyntaxError, ValueError, OverflowError, MemoryError) as error:
        # Jinja makes Python of a template, and some of that Python itself does not take: a thousand brackets.
        raise RecipeError(
            f"The prompt template cannot be compiled: {error}. "
            "Mend the template, or use --recipe chat or --recipe alpaca."
        ) from error


def render_template(source: str, variables: Mapping[str, Any]) -> str:
    """Return what the template prints for ``variables``.

    Raises:
        RecipeError: the template refuses the conversation (for example a system turn), or fails on it.
    """
    template = compile_template(source)
    try:
        return template.render(variables)
    except jinja2.TemplateError as error:
        raise RecipeError(f"the prompt template refuses this conversation: {error.message}") from error
    except (
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        NameError,
        ArithmeticError,
        AssertionError,
        RuntimeError,
        MemoryError,
    ) as error:
        # What a template's own expressions can raise: it is a program.
        raise RecipeError(f"the prompt template fails on this conversation: {error!r}") from error
