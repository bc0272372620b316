"""How much text that was held out surprises the base and the tuned model: the natural test of plain texts."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorasmith.data.dataset import TokenizedDataset, prepare_dataset
from lorasmith.data.settings import DataSettings
from lorasmith.errors import DataError
from lorasmith.evaluation.held_out import Kind, locate
from lorasmith.evaluation.perplexity import Surprise, surprises
from lorasmith.evaluation.questions import spread_evenly
from lorasmith.evaluation.settings import ReportSettings
from lorasmith.evaluation.statistics import Comparison
from lorasmith.evaluation.store import KeptChat
from lorasmith.model.run_record import RunRecord
from lorasmith.training.schedule import split_dataset
from lorasmith.training.settings import TrainingSettings


@dataclass(frozen=True, slots=True)
class HeldOutText:
    """Pieces of text that were not trained on, read by both; ``compared`` counts them by whom they surprise less."""

    name: str
    kind: Kind
    num_pieces: int
    num_read: int
    base: Surprise
    tuned: Surprise
    compared: Comparison

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "pieces": self.num_pieces,
            "read": self.num_read,
            "base": self.base.to_json(),
            "tuned": self.tuned.to_json(),
            "compared": {**asdict(self.compared), "p_value": self.compared.p_value},
        }


def read_held_out_text(
    run_dir: Path, record: RunRecord, base: KeptChat, tuned: KeptChat, settings: ReportSettings
) -> HeldOutText | None:
    """Have both sides read the run's validation texts; None where none were held out, or they have changed since.

    At most ``settings.max_questions`` pieces are read, spread evenly.

    Raises:
        DataError: the texts of data.validation cannot be read.
    """
    found = _find_texts(run_dir, record, tuned)
    if found is None:
        return None
    kind, texts = found
    places = spread_evenly(range(len(texts)), settings.max_questions)
    examples = [texts[place] for place in places]
    tokens = ["pieces", [example.input_ids.tolist() for example in examples]]

    def read(side: KeptChat) -> tuple[np.ndarray, np.ndarray]:
        kept = side.remember(tokens, lambda: {"each": [asdict(s) for s in surprises(side.chat, examples)]})
        each = [Surprise(**values) for values in kept["each"]]
        return np.array([s.loss for s in each]), np.array([s.num_tokens for s in each])

    before, num_tokens = read(base)
    after, _ = read(tuned)

    def together(losses: np.ndarray) -> Surprise:
        return Surprise(float(np.average(losses, weights=num_tokens)), int(num_tokens.sum()))

    return HeldOutText(
        name=Path(record.settings["data"]["validation"] or record.data["source"]).name,
        kind=kind,
        num_pieces=len(texts),
        num_read=len(places),
        base=together(before),
        tuned=together(after),
        compared=Comparison(
            both=0,
            gained=int((after < before).sum()),
            lost=int((after > before).sum()),
            neither=int((after == before).sum()),
        ),
    )


def _find_texts(run_dir: Path, record: RunRecord, side: KeptChat) -> tuple[Kind, TokenizedDataset] | None:
    data = DataSettings.model_validate(record.settings["data"])
    training = TrainingSettings.model_validate(record.settings["training"])
    recipe, tokenizer = side.chat.recipe, side.chat.tokenizer
    if data.validation is not None:
        source = locate(data.validation, run_dir)
        return "validation file", prepare_dataset(data, recipe, tokenizer, kind="documents", source=source)
    if not training.validation_share:
        return None
    try:
        texts = prepare_dataset(data, recipe, tokenizer, kind="documents", source=locate(data.train, run_dir))
    except DataError:  # gone, which a note of the report says
        return None
    if texts.fingerprint != record.data["fingerprint"]:
        return None  # other pieces would be held out now
    _, held_out = split_dataset(texts, training)
    return "validation share", texts.rows(held_out)
