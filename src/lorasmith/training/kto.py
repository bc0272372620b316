"""Learn from answers that are judged one by one, good or bad: KTO's loss, for rows that are not in pairs.

    good    w_d (1 - s(beta (g - z)))
    bad     w_u (1 - s(beta (z - g)))                                              mean over rows

    g = log p(y | x) - log p0(y | x)                              p0 the reference: the base
    z = max(0, mean over the step of log p(y' | x) - log p0(y' | x))     y' the answer to another question

s is the logistic function. z, how far the model has gone from the base as a whole, takes no gradient. Its answers
stand behind questions of other rows of the same step, so each step asks model and base for them anew: two passes
without gradient more. They are cut to the length of the longest example, so that they need no more memory than it.

Source: Ethayarajh et al. 2024 (arXiv 2402.01306, eq. 7 and 8); z as the authors' code and TRL estimate it: every answer
of the step once, behind the question of a neighbour. Both leave it to the order of rows that a neighbour has another
question (the authors shuffle the two answers of a pair apart, TRL puts all good ones before all bad ones). Here rows of
one question are told by their tokens and kept apart, also in a validation, whose rows are in the order of the file.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from peft import PeftModel

from lorasmith.data.tokens import IGNORE_INDEX, TokenizedExample
from lorasmith.engine.forward import PackForward
from lorasmith.errors import DataError, SettingsError
from lorasmith.model.method_settings import FullSettings, MethodSettings
from lorasmith.packing.trie import Pack
from lorasmith.training.objective import Ask, Objective
from lorasmith.training.schedule import group_by_question
from lorasmith.training.settings import ObjectiveSettings, TrainingSettings


class Kto(Objective):
    """Learns from labelled answers; ``tells`` means over the rows of a step, rewards over those of one kind."""

    tells = ("kl", "reward_desirable", "reward_undesirable", "reward_accuracy")

    def __init__(
        self,
        model: PeftModel,
        settings: ObjectiveSettings,
        references: Mapping[str, np.ndarray],
        is_rejected: Mapping[str, np.ndarray],
        longest: int,
    ) -> None:
        """By the name of the data set: ``references`` log probabilities of the base, ``is_rejected`` bool, both [N].

        ``longest``: tokens of the longest example.
        """
        self._model = model
        self._settings = settings
        self._references = {name: torch.from_numpy(values) for name, values in references.items()}
        self._is_rejected = {name: torch.from_numpy(values.copy()) for name, values in is_rejected.items()}
        self._longest = longest
        self._kl = 0.0
        self._num_rows: tuple[int, int] = 0, 0  # good and bad ones of the step, or of the whole validation

    def count(self, pack: Pack) -> int:
        return len(pack.examples)

    def look_ahead(
        self, dataset: Sequence[TokenizedExample], indices: Sequence[int], name: str, ask: Ask
    ) -> None:
        rows = [dataset[index] for index in indices]
        others = [
            exchange_answer(row, rows[place], self._longest)
            for row, place in zip(rows, places_of_others(rows), strict=True)
        ]
        now = ask(others)
        with self._model.disable_adapter():
            at_first = ask(others)
        self._kl = max(0.0, float((now - at_first).mean()))
        judged = self._is_rejected[name]
        if name == "train":  # a validation goes through all of its rows, and its means are over all of them
            judged = judged[list(indices)]
        num_bad = int(judged.sum())
        self._num_rows = len(judged) - num_bad, num_bad

    def loss(
        self, forward: PackForward, pack: Pack, name: str | None
    ) -> tuple[torch.Tensor, tuple[float, ...]]:
        assert name is not None, "reference and labels belong to a data set"
        log_probs = forward.log_probs(pack, name)
        rows = list(pack.examples)
        gain = log_probs - self._references[name][rows].to(log_probs)
        is_bad = self._is_rejected[name][rows].to(log_probs.device)
        sign = 1.0 - 2.0 * is_bad
        settings = self._settings
        weight = torch.where(is_bad, settings.weight_of_undesirable, settings.weight_of_desirable)
        losses = weight * torch.sigmoid(settings.scale * sign * (self._kl - gain))  # 1 - s(a) is s(-a)
        rewards = settings.scale * gain.detach()
        num_good, num_bad = (sum(self._num_rows) / max(1, number) for number in self._num_rows)
        return losses.sum(), (
            self._kl * len(rows),
            rewards[~is_bad].sum().item() * num_good,  # the loop divides by all rows
            rewards[is_bad].sum().item() * num_bad,
            (rewards * sign > 0).sum().item(),
        )


def places_of_others(rows: Sequence[TokenizedExample]) -> list[int]:
    """Return for each row the place of another, whose answer it is to be asked with; each place comes once.

    It has another question wherever no question has more than half of the rows; the row before, where all differ.

        questions a a b b    ->   2 3 0 1
        questions a b c d    ->   3 0 1 2
    """
    questions = group_by_question(rows)
    order = sorted(range(len(rows)), key=questions.__getitem__)  # those of one question side by side
    most = max(np.bincount(questions))  # moved on by so many places, none meets its own
    found = [0] * len(rows)
    for place, other in zip(order, [*order[-most:], *order[:-most]], strict=True):
        found[place] = other
    return found


def exchange_answer(row: TokenizedExample, other: TokenizedExample, longest: int) -> TokenizedExample:
    """Return the question of ``row`` with the answer of ``other``, cut to ``longest`` tokens."""
    ids, labels = (
        np.concatenate([getattr(row, field)[: _start(row)], getattr(other, field)[_start(other) :]])[:longest]
        for field in ("input_ids", "labels")
    )
    return TokenizedExample(ids, labels, f"{row.where} with the answer of {other.where}")


def check_objective(objective: ObjectiveSettings, method: MethodSettings, training: TrainingSettings) -> None:
    """Raise SettingsError where KTO cannot be computed with a method or a size of step."""
    if objective.name != "kto":
        return
    if isinstance(method, FullSettings) or method.changes_base:
        raise SettingsError(
            f"objective.name=kto asks the base in every step, and method.name={method.name} changes the base's own "
            "weights. Use an adapter of the kind method.name=lora, or pairs and objective.name=dpo."
        )
    if training.batch_size < 2:
        raise SettingsError(
            "training.batch_size is 1, and objective.name=kto compares each answer with others of its step. Use 2 or "
            "more; 8 is better."
        )


def check_labels(is_rejected: np.ndarray, source: str) -> None:
    """Raise DataError where all answers are labelled alike: nothing could be told apart."""
    if is_rejected.all() or not is_rejected.any():
        label, other = ("false", "true") if is_rejected.all() else ("true", "false")
        raise DataError(
            f"{source}: all {len(is_rejected):,} answers are labelled {label}. objective.name=kto learns to tell good "
            f"from bad: add answers labelled {other}"
            + (
                "."
                if label == "false"
                else ", or train on the good ones alone: objective.name=sft, without labels."
            )
        )


def advise_weights(is_rejected: np.ndarray, settings: ObjectiveSettings) -> str | None:
    """Return weights that balance the two kinds, where those of ``settings`` do not; None where they do.

    The paper (section 4.2, eq. 9) wants the good answers' weight, all together, between 1 and 4/3 of the bad ones'.
    """
    num_bad = int(is_rejected.sum())
    num_good = len(is_rejected) - num_bad
    ratio = num_good * settings.weight_of_desirable / (num_bad * settings.weight_of_undesirable)
    if 1 <= round(ratio, 2) <= 1.34:
        return None
    if ratio < 1:
        return f"objective.desirable_weight={settings.weight_of_desirable / ratio:.3g}"
    return f"objective.undesirable_weight={settings.weight_of_undesirable * ratio:.3g}"


def _start(row: TokenizedExample) -> int:
    """Return the place of the answer's first learnt token."""
    return int(np.argmax(row.labels != IGNORE_INDEX))
