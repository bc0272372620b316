"""Learn which of two answers is the better one: losses of the same loop.

    dpo     -log s(beta (c - r))                                                  mean over pairs
    ipo     (c / |c| - r / |r| - 1 / (2 beta))^2                                  mean over pairs
    orpo    -p(c) - beta log s(log odds(c) - log odds(r))      without reference  mean over pairs
    simpo   -log s(beta (p(c) - p(r)) - margin)                without reference  mean over pairs

c and r are the log probabilities of the chosen and the rejected answer minus those that the reference gives, |c|
an answer's tokens, p(c) its log probability without reference for each token, s the logistic function.

The reference is the base: the model with the adapter switched off. Its log probabilities never change, so they are
computed once before the first step, kept in the cache, and no second model stands in memory.

Sources: Rafailov et al. 2023 (arXiv 2305.18290, eq. 7); Azar et al. 2023 (2310.12036, eq. 17), for each token as
TRL has it after asking its authors; Hong et al. 2024 (2403.07691, eq. 6 and 7); Meng et al. 2024 (2405.14734, eq. 6).
"""

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel

from lorasmith.data.cache import cache_dir, read_arrays, write_arrays
from lorasmith.data.tokens import TokenizedExample
from lorasmith.engine.forward import PackForward
from lorasmith.model.method_settings import FullSettings, MethodSettings
from lorasmith.packing.trie import Pack, pack_examples
from lorasmith.training.distributed import ALONE, Team
from lorasmith.training.objective import Objective, ask_packs
from lorasmith.training.settings import ObjectiveSettings

_CACHE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Answers:
    """One answer of each of P pairs: all float32 [P]."""

    log_probs: torch.Tensor  # with a graph
    reference: torch.Tensor  # log probabilities of the base; 0 where the objective has no reference
    num_tokens: torch.Tensor

    @property
    def gain(self) -> torch.Tensor:
        return self.log_probs - self.reference

    @property
    def mean_log_prob(self) -> torch.Tensor:
        return self.log_probs / self.num_tokens


class Preference(Objective):
    """Learns from pairs: the examples 2i and 2i + 1 of a data set, the chosen answer first."""

    tells: tuple[str, ...] = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy")

    def __init__(self, settings: ObjectiveSettings, references: Mapping[str, np.ndarray]) -> None:
        """``references`` are log probabilities of the base, float32 [examples], by the name of the data set."""
        assert references or not settings.needs_reference
        self._settings = settings
        self._loss = _LOSSES[settings.name]
        self._references = {name: torch.from_numpy(values) for name, values in references.items()}

    def count(self, pack: Pack) -> int:
        return len(pack.examples) // 2

    def loss(
        self, forward: PackForward, pack: Pack, name: str | None
    ) -> tuple[torch.Tensor, tuple[float, ...]]:
        log_probs = forward.log_probs(pack, name)
        places = {example: place for place, example in enumerate(pack.examples)}
        of_chosen = sorted(example for example in pack.examples if example % 2 == 0)
        sides = []
        for examples in (of_chosen, [example + 1 for example in of_chosen]):
            where = torch.tensor([places[example] for example in examples], device=log_probs.device)
            num_tokens = torch.from_numpy(pack.learnt_of).to(log_probs)[where]
            reference = torch.zeros_like(num_tokens)
            if self._settings.needs_reference:
                assert name is not None, "the reference belongs to a data set"
                reference = self._references[name][examples].to(log_probs)
            sides.append(Answers(log_probs[where], reference, num_tokens))
        chosen, rejected = sides
        losses = self._loss(chosen, rejected, self._settings)
        with torch.no_grad():
            rewards = [
                self._settings.scale * (side.gain if self._settings.needs_reference else side.mean_log_prob)
                for side in sides
            ]
        return losses.sum(), (
            rewards[0].sum().item(),
            rewards[1].sum().item(),
            (rewards[0] - rewards[1]).sum().item(),
            (rewards[0] > rewards[1]).sum().item(),
        )


def _dpo(chosen: Answers, rejected: Answers, settings: ObjectiveSettings) -> torch.Tensor:
    return -logsigmoid(settings.scale * (chosen.gain - rejected.gain))


def _ipo(chosen: Answers, rejected: Answers, settings: ObjectiveSettings) -> torch.Tensor:
    difference = chosen.gain / chosen.num_tokens - rejected.gain / rejected.num_tokens
    return (difference - 1 / (2 * settings.scale)) ** 2


def _orpo(chosen: Answers, rejected: Answers, settings: ObjectiveSettings) -> torch.Tensor:
    return -chosen.mean_log_prob - settings.scale * logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _simpo(chosen: Answers, rejected: Answers, settings: ObjectiveSettings) -> torch.Tensor:
    difference = chosen.mean_log_prob - rejected.mean_log_prob
    return -logsigmoid(settings.scale * difference - settings.target_margin)


def _log_odds(answers: Answers) -> torch.Tensor:
    """Return log(p / (1 - p)) of the mean probability of a token; log(1 - p) by expm1, exact where p is near 1."""
    log_p = answers.mean_log_prob
    return log_p - torch.log(-torch.expm1(log_p))


_LOSSES: dict[str, Callable[[Answers, Answers, ObjectiveSettings], torch.Tensor]] = {
    "dpo": _dpo,
    "ipo": _ipo,
    "orpo": _orpo,
    "simpo": _simpo,
}


def reference_log_probs(
    model: PeftModel | PreTrainedModel,
    forward: PackForward,
    dataset: Sequence[TokenizedExample],
    name: str,
    method: MethodSettings,
    *,
    base_key: str,
    max_tokens: int,
    cache: str | None = None,
    team: Team = ALONE,
    on_progress: Callable[[float], None] = lambda share: None,
) -> np.ndarray:
    """Return the base's log probability of each example's learnt tokens, float32 [N]; from the cache if it is there.

    Call it before the first step, also of a run that goes on. ``base_key`` names the base's weights and format,
    ``cache`` another folder for the cache.
    """
    path = cache_dir(cache) / "reference" / f"{_key(base_key, dataset)}.npz"
    found = read_arrays(path)
    if not team.any(found is None):  # all compute or none: the passes over a sharded base are made together
        assert found is not None, "no process lacks it"
        return found["log_probs"]
    log_probs = np.zeros(len(dataset), np.float32)
    # A method that starts inside the base's weights, and one that trains them, is the base before the first step.
    is_base = isinstance(method, FullSettings) or method.changes_base
    adapter_off = model.disable_adapter() if isinstance(model, PeftModel) and not is_base else None
    model.eval()
    with torch.no_grad(), adapter_off or contextlib.nullcontext():
        for low in range(0, len(dataset), 64):
            indices = range(low, min(low + 64, len(dataset)))
            packs = pack_examples(
                dataset,
                indices,
                max_tokens=max_tokens,
                num_processes=team.count,
                share_prefixes=forward.share_prefixes,
                cost=forward.cost,
            )
            log_probs[low : indices.stop] = ask_packs(forward, packs, indices, name, team)
            on_progress(indices.stop / len(dataset))
    write_arrays(path, {"log_probs": log_probs})
    return log_probs


def _key(base_key: str, dataset: Sequence[TokenizedExample]) -> str:
    digest = hashlib.sha256(f"{_CACHE_VERSION} {base_key}".encode())
    for example in dataset:
        digest.update(len(example.input_ids).to_bytes(8, "little"))
        digest.update(example.input_ids.tobytes())
        digest.update(example.labels.tobytes())
    return digest.hexdigest()
