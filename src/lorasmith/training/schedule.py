"""The learning rate of each step, and which examples each step takes: pure functions of settings and step.

Nothing here has a state, so a resumed run needs only its step number.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lorasmith.data.dataset import TokenizedDataset
from lorasmith.data.tokens import IGNORE_INDEX, TokenizedExample, documents_of, examples_per_row, num_rows
from lorasmith.model.method_settings import MethodSettings
from lorasmith.training.settings import ObjectiveSettings, TrainingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_FULL_FINETUNING_RATE = 5e-5
_LORA_MULTIPLE = 10.0
_REFERENCE_HIDDEN_SIZE = 2000
_EXPONENT = {"qwen2": 0.0775, "qwen3": 0.0775}
_USUAL_EXPONENT = 0.781  # fitted on Llama models


def suggest_learning_rate(model_type: str, hidden_size: int, multiple: float = _LORA_MULTIPLE) -> float:
    """Return 5e-5 * 10 * (2000 / hidden_size)^p, the fit of "LoRA Without Regret" over model sizes.

    ``multiple`` of full fine-tuning's rate is 10 for LoRA, 15 in short runs; other methods bring their own.

    Source: Schulman et al. 2025 and the tinker cookbook's ``get_lr``; p is 0.781 for Llama, 0.0775 for Qwen.
    SmolLM2-135M (hidden size 576) gets 1.3e-3, an 8B Llama (4096) 2.9e-4.
    """
    exponent = _EXPONENT.get(model_type, _USUAL_EXPONENT)
    return _FULL_FINETUNING_RATE * multiple * (_REFERENCE_HIDDEN_SIZE / hidden_size) ** exponent


def choose_learning_rate(
    config: "PreTrainedConfig", method: MethodSettings, objective: ObjectiveSettings, num_steps: int
) -> float:
    """Return what "auto" means for a base of this ``config``, a method, an objective and a run's length."""
    text = config.get_text_config()
    multiple = method.rate_multiple_for(num_steps) * objective.rate_multiple
    return suggest_learning_rate(text.model_type, text.hidden_size, multiple)


def learning_rate_at(step: int, num_steps: int, settings: TrainingSettings, highest: float) -> float:
    """Return the learning rate of step ``step`` (0-based) of ``num_steps``.

    Without warm-up it equals transformers' cosine and linear schedules. The warm-up starts at
    ``highest / (warmup + 1)`` and not at 0: a step at rate 0 teaches nothing.
    """
    warmup = settings.num_warmup_steps(num_steps)
    if step < warmup:
        return highest * (step + 1) / (warmup + 1)
    if settings.lr_schedule == "constant":
        return highest
    done = (step - warmup) / max(1, num_steps - warmup)
    if settings.lr_schedule == "linear":
        return highest * (1 - done)
    return highest * 0.5 * (1 + math.cos(math.pi * done))


class StepOrder:
    """Which examples each step takes: a new seeded order every epoch, a pure function of settings and step.

    With ``groups`` (int [N], a number for each example), examples of one group come in the same steps as far as
    they fill them: a group of 21 fills two steps of 8 and leaves 5, which share a step with what others leave.
    The order within a group, of the leftovers and of the steps is shuffled.

    A row is ``per_row`` examples that follow each other: a pair of answers is never torn.
    """

    def __init__(
        self, num_rows: int, settings: TrainingSettings, groups: np.ndarray | None = None, per_row: int = 1
    ) -> None:
        self._num_rows = num_rows
        self._per_row = per_row
        self._settings = settings
        self._groups = groups
        self._epoch = -1
        self._steps: list[np.ndarray] = []

    def examples_of(self, step: int) -> list[int]:
        """Return the indices of the examples of step ``step`` (0-based)."""
        epoch, place = divmod(step, self._settings.steps_per_epoch(self._num_rows))
        if epoch != self._epoch:
            self._epoch, self._steps = epoch, self._steps_of(epoch)
        rows = self._steps[place][:, None] * self._per_row
        return (rows + np.arange(self._per_row)).flatten().tolist()

    def _steps_of(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self._settings.seed, epoch])
        order = rng.permutation(self._num_rows)
        size = self._settings.batch_size
        if self._groups is None:
            return [order[low : low + size] for low in range(0, len(order), size)]
        order = order[np.argsort(self._groups[order], kind="stable")]
        _, members = np.unique(self._groups, return_counts=True)
        of_group = np.repeat(np.arange(len(members)), members)  # for each place of order
        place_in_group = np.arange(len(order)) - np.repeat(np.cumsum(members) - members, members)
        fills = place_in_group < (members // size * size)[of_group]
        rest, rest_group = order[~fills], of_group[~fills]
        rest = rest[np.argsort(rng.permutation(len(members))[rest_group], kind="stable")]
        steps = [*order[fills].reshape(-1, size)]
        steps += [rest[low : low + size] for low in range(0, len(rest), size)]
        return [steps[index] for index in rng.permutation(len(steps))]


def order_steps(dataset: Sequence[TokenizedExample], settings: TrainingSettings) -> StepOrder:
    """Return the order in which a run with ``settings`` takes ``dataset``."""
    prefix = settings.group_prefix_tokens
    per_row = examples_per_row(dataset)
    groups = None if prefix is None else group_by_prefix(dataset, prefix)[::per_row]
    return StepOrder(num_rows(dataset), settings, groups, per_row)


def group_by_prefix(dataset: Sequence[TokenizedExample], num_tokens: int) -> np.ndarray:
    """Return int64 [N]: the same number for examples that begin with the same ``num_tokens`` tokens.

    A shorter example is a group of its own.
    """
    digests = np.empty(len(dataset), np.uint64)
    for index, example in enumerate(dataset):
        head = example.input_ids[:num_tokens]
        key = head.tobytes() if len(head) == num_tokens else f"example {index}".encode()
        digests[index] = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest())
    return np.unique(digests, return_inverse=True)[1]


def split_dataset(dataset: TokenizedDataset, settings: TrainingSettings) -> tuple[list[int], list[int]]:
    """Return the rows of ``dataset`` to train on and the held-out ones; see :func:`split_for_validation`.

    What stays together: the pieces of a document; of pairs and of labelled answers those to the same question.
    """
    together = documents_of(dataset)
    if settings.validation_share and dataset.kind in ("pairs", "labelled"):
        together = group_by_question(dataset)
    return split_for_validation(num_rows(dataset), settings, together)


def group_by_question(dataset: Sequence[TokenizedExample]) -> np.ndarray:
    """Return int64 [rows], numbered as they first come: the same for rows with the same tokens before the answer."""
    numbers: dict[bytes, int] = {}
    found = []
    for index in range(0, len(dataset), examples_per_row(dataset)):
        example = dataset[index]
        question = example.input_ids[: int(np.argmax(example.labels != IGNORE_INDEX))]
        digest = hashlib.blake2b(question.tobytes(), digest_size=8).digest()
        found.append(numbers.setdefault(digest, len(numbers)))
    return np.array(found, np.int64)


def split_for_validation(
    num_rows: int, settings: TrainingSettings, together: np.ndarray | None = None
) -> tuple[list[int], list[int]]:
    """Return the rows to train on and the held-out ones, both in the data's order; seeded.

    ``together`` (int [num_rows]): rows of one number (pieces of a document, answers to a question) are held out
    together, where so many numbers are small enough to fill half of the share; else each row by itself, and others of
    its number are trained on. A share smaller than two rows may become two.
    """
    num_held_out = max(1, round(settings.validation_share * num_rows)) if settings.validation_share else 0
    rng = np.random.default_rng([settings.seed, 0x5EED])
    held_out = _pick_together(together, num_held_out, rng) if together is not None else set()
    if len(held_out) < num_held_out / 2:
        held_out = set(rng.permutation(num_rows)[:num_held_out].tolist())
    return [i for i in range(num_rows) if i not in held_out], sorted(held_out)


def _pick_together(together: np.ndarray, most: int, rng: np.random.Generator) -> set[int]:
    """Return the places of all rows of some numbers, taken at random, about ``most`` rows."""
    names, sizes = np.unique(together, return_counts=True)
    if most and len(names) > 1:
        most = max(most, min(2, sizes.min()))
    chosen = []
    for place in rng.permutation(len(names)):
        if sizes[place] <= most:
            chosen.append(names[place])
            most -= int(sizes[place])
    return set(np.flatnonzero(np.isin(together, chosen)).tolist())
