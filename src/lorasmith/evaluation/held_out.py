"""Which questions a run is judged by, and what it was trained on: read again from its data, never guessed."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lorasmith.data.dataset import NO_ROOM, OVERLONG, TokenizedDataset, prepare_dataset
from lorasmith.data.example import Example
from lorasmith.data.prompts import PromptRecipe
from lorasmith.data.readers import Position
from lorasmith.data.reading import read_examples
from lorasmith.data.receipt import Ledger
from lorasmith.data.settings import DataSettings, RowKind
from lorasmith.data.sources import Source, open_source
from lorasmith.data.tokens import encode, examples_per_row
from lorasmith.errors import DataError, RecipeError
from lorasmith.evaluation.overlap import find_leaks
from lorasmith.evaluation.questions import EvaluationRow, read_evaluation_rows, spread_evenly
from lorasmith.evaluation.settings import ReportSettings
from lorasmith.model.run_record import RunRecord
from lorasmith.training.schedule import split_dataset
from lorasmith.training.settings import TrainingSettings

_LATE_SKIPS = {OVERLONG, NO_ROOM, "recipe"}  # a receipt's words for rows that were read and then left out

Kind = Literal["held-out file", "validation file", "validation share"]


@dataclass(frozen=True, slots=True)
class Leak:
    """A held-out row that was trained on, and so is left out: its question and place, and that in the training data."""

    question: str
    where: str
    trained_at: str


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """The questions of one source that are asked, and those that are left out."""

    name: str
    kind: Kind
    num_rows: int
    rows: tuple[EvaluationRow, ...]
    leaked: tuple[Leak, ...]


class TrainingData:
    """The examples that a run was trained on, read again; ``note`` says where that is not possible."""

    def __init__(self, run_dir: Path, record: RunRecord) -> None:
        self._data = DataSettings.model_validate(record.settings["data"])
        self._kind: RowKind = record.row_kind
        self._training = TrainingSettings.model_validate(record.settings["training"])
        self._num_examples: int = record.data["num_examples"]
        self._source: Source | None = None
        self.note: str | None = None
        self._held_out: frozenset[int] = frozenset()  # the validation share, by number among what is read
        self._place = locate(self._data.train, run_dir)
        try:
            self._source = open_source(self._place, split=self._data.split, kind=self._kind)
            if self._source.fingerprint() != record.data["fingerprint"]:
                name = self._data.train
                self.note = (
                    f"The training data {name} has changed since the run; it was compared as it is now."
                )
        except DataError as fault:
            self._source = None
            self.note = (
                f"The training data cannot be read, so leakage and copying were not looked for: {fault}"
            )

    @property
    def is_there(self) -> bool:
        return self._source is not None

    def examples(self) -> Iterator[Example]:
        """Yield what was trained on, without the validation share; nothing where it is gone.

        Of plain texts, the documents that were held out are among them.
        """
        return (example for number, example in enumerate(self._read()) if number not in self._held_out)

    def answers(self) -> Iterator[Example]:
        """Yield the examples whose answers were to be learnt, not those to turn away from."""
        return (example for example in self.examples() if not example.is_rejected)

    def count_answers(self) -> int:
        """Return how many ``answers`` there are."""
        return sum(1 for _ in self.answers()) if self._kind == "labelled" else self._num_examples

    def hold_out_share(self, recipe: PromptRecipe, tokenizer: Any) -> list[EvaluationRow]:
        """Return the rows of the run's validation share, and leave them out of ``examples`` from now on."""
        if self._source is None or not self._training.validation_share or self._kind == "documents":
            return []
        data = self._data.model_copy(update={"train": self._place, "on_bad_row": "skip"})
        used = prepare_dataset(data, recipe, tokenizer, kind=self._kind)
        _, held_out = split_dataset(used, self._training)
        numbers = np.array(list(self._number_used(used, recipe, tokenizer))).reshape(
            -1, examples_per_row(used)
        )
        self._held_out = frozenset(numbers[np.array(held_out, int)].ravel().tolist())
        return [
            as_row(example)
            for number, example in enumerate(self._read())
            if number in self._held_out and not example.is_rejected
        ]

    def _number_used(self, used: TokenizedDataset, recipe: PromptRecipe, tokenizer: Any) -> Iterator[int]:
        """Yield the number of each used row among all that are read; some of these may be too long or refused.

        Places do not tell rows apart: a .json file may be one line. So where rows were left out, tokens are compared.
        """
        if not _LATE_SKIPS & used.receipt.skipped.keys():
            yield from range(len(used))
            return
        place = 0
        for number, example in enumerate(self._read()):
            try:
                ids, _ = encode(recipe.render(example), tokenizer)
            except RecipeError:
                continue
            wanted = used[place].input_ids if place < len(used) else None
            if wanted is not None and np.array_equal(ids[: len(wanted) - 1], wanted[:-1]):
                place += 1
                yield number

    def _read(self) -> Iterator[Example]:
        if self._source is None:
            return
        ledger = Ledger(self._source.name, [file.name for file in self._source.files], skips_faults=True)
        for example, _ in read_examples(self._source, self._data.format, ledger, Position(), self._kind):
            yield example


def as_row(example: Example) -> EvaluationRow:
    """Return an example as a question with its reference answer."""
    return EvaluationRow(example.question, example.answer, (), example.where)


def locate(name: str, run_dir: Path) -> str:
    """Return where a path that a run noted is now: as it stands, or from a folder above the run."""
    if Path(name).is_absolute() or Path(name).exists():
        return name
    places = [parent / name for parent in run_dir.resolve().parents]
    return next((str(place) for place in places if place.exists()), name)


def choose_questions(
    run_dir: Path,
    record: RunRecord,
    training: TrainingData,
    settings: ReportSettings,
    recipe: PromptRecipe,
    tokenizer: Any,
) -> tuple[QuestionSet, ...]:
    """Return what the run is judged by: its held-out files, else its validation file, else its validation share.

    Rows that also stand in the training data are left out, by name.

    Raises:
        DataError: a file that is named cannot be read.
    """
    share = training.hold_out_share(recipe, tokenizer)
    validation = record.settings["data"].get("validation")
    found: list[tuple[str, Kind, list[EvaluationRow]]]
    if settings.data:
        found = [
            (name, "held-out file", read_evaluation_rows(locate(name, run_dir), record.row_kind))
            for name in settings.data
        ]
    elif validation and record.row_kind != "documents":
        found = [
            (
                validation,
                "validation file",
                read_evaluation_rows(locate(validation, run_dir), record.row_kind, skips_faults=True),
            )
        ]
    elif share:
        found = [(record.data["source"], "validation share", share)]
    else:
        found = []
    places = find_leaks([row for _, _, rows in found for row in rows], training.examples())
    sets, first = [], 0
    for name, kind, rows in found:
        trained_at = [places.get(first + number) for number in range(len(rows))]
        new = [row for row, place in zip(rows, trained_at, strict=True) if place is None]
        leaked = [
            Leak(r.question, r.where, place) for r, place in zip(rows, trained_at, strict=True) if place
        ]
        asked = tuple(spread_evenly(new, settings.max_questions))
        sets.append(QuestionSet(Path(name).name, kind, len(rows), asked, tuple(leaked)))
        first += len(rows)
    return tuple(sets)


def sample_training(examples: Iterable[Example], num_examples: int, most: int) -> list[EvaluationRow]:
    """Return at most ``most`` of about ``num_examples`` training questions, spread evenly over the data."""
    wanted = set(spread_evenly(range(num_examples), most))
    return [as_row(example) for number, example in enumerate(examples) if number in wanted]
