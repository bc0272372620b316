"""Answers that must be JSON of a schema: which tokens may come next. The only importer of llguidance."""

import json
import weakref
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lorasmith.errors import MissingExtraError, SettingsError

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from transformers import PreTrainedTokenizerBase

# As json.dumps writes by default. Free white space invites small models to write nothing else.
_LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

_tokenizers: weakref.WeakKeyDictionary[Any, "LLTokenizer"] = weakref.WeakKeyDictionary()


class Guide:
    """Holds one answer to a JSON schema, token by token; when the value is whole, only an end token may follow."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        schema: Mapping[str, Any],
        *,
        end_token_ids: Collection[int],
        vocab_size: int,
    ) -> None:
        """Compile ``schema``; the first one of a tokenizer takes a second more.

        Raises:
            MissingExtraError: without llguidance. SettingsError: the schema is wrong or says what cannot be held to.
        """
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise MissingExtraError("A JSON schema for answers", "llguidance", "serve") from None
        grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_LAYOUT)
        self._matcher = LLMatcher(_read_tokenizer(tokenizer, end_token_ids, vocab_size), grammar, log_level=0)
        if fault := self._matcher.get_error():
            raise SettingsError(
                f"response_format: the schema cannot be used: {fault.strip().splitlines()[0]}"
            )

    def restrict(self, logits: torch.Tensor) -> torch.Tensor:
        """Return ``logits`` [V] with those of tokens that may not come next at minus infinity."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        forbidden = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: len(logits)] == 0)
        return logits.masked_fill(forbidden.to(logits.device), float("-inf"))

    def accept(self, token_id: int) -> str | None:
        """Note the token that came; say why the schema can be held to no longer, if so."""
        self._matcher.consume_token(token_id)
        return self._matcher.get_error() or None


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
