"""The data of a run: what is trained on, what is held out, and what run.json notes of it."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from lorasmith.data.dataset import CHECK_FLAGS, TokenizedDataset, prepare_dataset
from lorasmith.data.prompts import PromptRecipe
from lorasmith.data.receipt import Receipt
from lorasmith.data.settings import ROW_WORDS, DataSettings, RowKind, in_number
from lorasmith.data.tokens import documents_of, num_rows, tokenizer_json
from lorasmith.errors import DataError
from lorasmith.training.distributed import Team
from lorasmith.training.schedule import split_dataset
from lorasmith.training.settings import TrainingSettings


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """``receipt`` is of the training data, the validation share included; ``noted`` is run.json's part ``data``."""

    dataset: TokenizedDataset
    validation: TokenizedDataset | None
    receipt: Receipt
    noted: dict[str, Any]


def read_rows(
    data: DataSettings,
    training: TrainingSettings,
    kind: RowKind,
    recipe: PromptRecipe,
    tokenizer: PreTrainedTokenizerBase,
    *,
    say: Callable[[str], None],
    progress: Callable[[str, float], None],
    team: Team,
) -> TrainingRows:
    """Read and tokenise the training and the validation data, or find them in the cache.

    Raises:
        DataError: rows are wrong, or none is left to train on or to validate with.
    """

    def prepare(source: str) -> TokenizedDataset:
        with team.first_on_each_machine():
            return prepare_dataset(
                data,
                recipe,
                tokenizer,
                kind=kind,
                source=source,
                progress=lambda rows, share: progress("Reading and tokenising", share),
            )

    all_rows = prepare(data.train)
    documents = documents_of(all_rows)
    kept, held_out = split_dataset(all_rows, training)
    if not kept:
        raise DataError(
            f"{data.train} leaves nothing to train on: all of it that can be used, {_count(all_rows)}, is held out by "
            f"training.validation_share={training.validation_share:g}. Give more data, or leave the share out. What "
            f"became of each row: lorasmith check {CHECK_FLAGS[kind]}{data.train}"
        )
    dataset = all_rows.rows(kept)
    validation: TokenizedDataset | None = all_rows.rows(held_out) if held_out else None
    if documents is not None:
        say(_describe_documents(all_rows.receipt, documents, held_out))
    if data.validation is not None:
        validation = prepare(data.validation)
        if len(validation) == 0:
            raise DataError(f"{data.validation} holds no example that can be used for the validation loss.")
    noted = {
        "source": data.train,
        "kind": kind,
        "fingerprint": all_rows.fingerprint,
        "validation_fingerprint": validation.fingerprint if data.validation and validation else None,
        "tokenizer_fingerprint": hashlib.sha256(tokenizer_json(tokenizer).encode()).hexdigest(),
        "num_examples": num_rows(dataset),
        "num_validation": 0 if validation is None else num_rows(validation),
    }
    return TrainingRows(dataset, validation, all_rows.receipt, noted)


def _count(dataset: TokenizedDataset) -> str:
    """Return how many rows there are, in words, called as training counts them."""
    return in_number(num_rows(dataset), ROW_WORDS[dataset.kind])


def _describe_documents(receipt: Receipt, documents: np.ndarray, held_out: Sequence[int]) -> str:
    """Say how many documents and pieces there are, and which are held out."""
    text = f"Texts: {receipt.used:,} documents in {receipt.pieces:,} pieces"
    if not held_out:
        return text
    chosen = set(documents[list(held_out)].tolist())
    if np.isin(documents, list(chosen)).sum() == len(held_out):
        return f"{text}; held out: {len(chosen):,} documents, {len(held_out):,} pieces"
    return (
        f"{text}; held out: {len(held_out):,} pieces, whose documents' other pieces are trained on (no document is "
        "short enough to be held out whole: data.validation names other texts)"
    )
