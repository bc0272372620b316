"""Answers that must be JSON of a schema: which tokens may come next. The only importer of llguidance."""

import json
import weakref
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lorasmith.errors import MissingExtraError, SettingsError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerBase

# As json.dumps writes by default. Free white space invites small models to write nothing else.
_LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_tokenizers: weakref.WeakKeyDictionary[Any, "LLTokenizer"] = weakref.WeakKeyDictionary()


class Guide:
    """Holds one answer to a JSON schema, token by token; when the value is whole, only an end token may follow."""

    def __init__(self, matcher: "LLMatcher") -> None:
        self._matcher = matcher

    def copy(self) -> "Guide":
        """Return another one at the same place, for another answer."""
        return Guide(self._matcher.deep_copy())

    def restrict(self, logits: torch.Tensor) -> torch.Tensor:
        """Return ``logits`` [V] with those of tokens that may not come next at minus infinity."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        forbidden = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: len(logits)] == 0)
        return logits.masked_fill(forbidden.to(logits.device), float("-inf"))

    def accept(self, token_id: int) -> str | None:
        """Note the token that came; say why the schema can be held to no longer, if so."""
        self._matcher.consume_token(token_id)
        return self._matcher.get_error() or None


def compile_schema(
    schema: Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    end_token_ids: Collection[int],
    vocab_size: int,
) -> Guide:
    """Return what holds an answer to ``schema``; the first one of a tokenizer takes a second more.

    Raises:
        MissingExtraError: without llguidance. SettingsError: the schema is wrong or says what cannot be held to.
    """
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise MissingExtraError("A JSON schema for answers", "llguidance", "serve") from None
    try:
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_LAYOUT)
    except ValueError as fault:  # nested too deeply, for one
        raise SettingsError(f"response_format: the schema cannot be used: {fault}") from None
    matcher = LLMatcher(_read_tokenizer(tokenizer, end_token_ids, vocab_size), grammar, log_level=0)
    matcher.compute_bitmask()  # a schema that no value fits shows here
    if fault := matcher.get_error():
        raise SettingsError(f"response_format: the schema cannot be used: {fault.strip().splitlines()[0]}")
    return Guide(matcher)


def _read_tokenizer(
    tokenizer: "PreTrainedTokenizerBase", end_token_ids: Collection[int], vocab_size: int
) -> "LLTokenizer":
    from llguidance.hf import from_tokenizer

    if tokenizer not in _tokenizers:
        _tokenizers[tokenizer] = from_tokenizer(
            tokenizer,  # pyright: ignore[reportArgumentType]
            n_vocab=vocab_size,
            eos_token=sorted(end_token_ids),
        )
    return _tokenizers[tokenizer]
