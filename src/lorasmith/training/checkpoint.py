"""Checkpoints that appear whole or not at all, and from which a run goes on bit by bit as if never stopped.

    checkpoints/
      step-000050/
        adapter/                plain PEFT: can be asked like a finished run (full fine-tuning: model/)
        optimizer.safetensors   AdamW's two moments of every trained tensor, and what else going on needs:
                                the trained numbers where adapter/ has them in another form, AdaLoRA's scores
        state.json              step, best validation so far and whether it is this one's, a probe loss
        SHA256SUMS              of every file above

The order of examples and the random numbers of a step are functions of seed and step (schedule.py, loop.py), so
the step number is all the position there is. The names alone tell which is the last: no clock is asked, and there
is no pointer that a crash could leave behind. Nothing is pickled.
"""

import contextlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load, save_file
from transformers import PreTrainedModel

from lorasmith.errors import ResumeError
from lorasmith.files import find_damage, whole_folder, write_checksums
from lorasmith.model.adapter_folder import read_adapter_config
from lorasmith.model.trained import (
    ADAPTER,
    is_saved_as_trained,
    load_trained_numbers,
    restore_trained,
    save_trained,
    trained_files,
)
from lorasmith.training.distributed import ALONE, Team
from lorasmith.training.method_steps import method_state, restore_method_state

_NUMBERS, _METHOD = "number.", "method."  # in _OPTIMIZER, before a name
_OPTIMIZER, _STATE = "optimizer.safetensors", "state.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint on disk, not yet loaded."""

    folder: Path
    step: int  # optimizer steps done
    probe_loss: float  # mean loss of the last step's first pack, with the saved weights
    best_validation: float | None
    scaler: dict[str, float]  # of float16's loss scale; empty in other formats


def checkpoint_name(step: int) -> str:
    """Return the name of a step's folder below checkpoints/: "step-000050"."""
    return f"step-{step:06d}"


def save_checkpoint(
    run_dir: Path,
    model: PeftModel | PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    *,
    step: int,
    probe_loss: float,
    best_validation: float | None,
    is_best: bool,
    keep: int,
) -> Path:
    """Write ``checkpoints/step-NNNNNN`` and remove all but the last ``keep`` and the best."""
    folder = run_dir / "checkpoints" / checkpoint_name(step)
    with whole_folder(folder) as part:
        save_trained(model, part, allow_no_effect=True)
        save_file(_optimizer_tensors(model, optimizer), part / _OPTIMIZER)
        state = {
            "step": step,
            "probe_loss": probe_loss,
            "best_validation": best_validation,
            "is_best": is_best,
            "scaler": scaler.state_dict(),
        }
        (part / _STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        write_checksums(part)
    prune_checkpoints(run_dir, step, keep)
    return folder


def prune_checkpoints(run_dir: Path, step: int, keep: int) -> None:
    """Remove all but the last ``keep`` checkpoints up to ``step`` and the best.

    A run that goes on from ``step`` writes those after it anew (they can only be damaged ones), and does what a
    killed process had no time to remove.
    """
    done = [folder for folder in _by_step(run_dir) if _step_of(folder) <= step]
    kept = {*done[-keep:], best_checkpoint(run_dir)}
    for folder in _by_step(run_dir):
        if folder not in kept or _step_of(folder) > step:
            shutil.rmtree(folder)


def _by_step(run_dir: Path) -> list[Path]:
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted((folder for folder in found if re.fullmatch(r"step-\d+", folder.name)), key=_step_of)


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def best_checkpoint(run_dir: Path) -> Path | None:
    """Return the folder of the checkpoint with the lowest validation loss, if there was a validation."""
    for folder in reversed(_by_step(run_dir)):
        with contextlib.suppress(OSError, ValueError, KeyError):  # a damaged one is nobody's best
            if json.loads((folder / _STATE).read_text(encoding="utf-8"))["is_best"]:
                return folder
    return None


def last_checkpoint(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint whose files are whole, and what is wrong with newer ones, in words.

    (None, []) if the run has not come to its first checkpoint.

    Raises:
        ResumeError: there are checkpoints, and every one of them is damaged.
    """
    complaints: list[str] = []
    for folder in reversed(_by_step(run_dir)):
        state = _read_state(folder)
        if isinstance(state, dict):
            return Checkpoint(
                folder, state["step"], state["probe_loss"], state["best_validation"], state["scaler"]
            ), [f"{complaint}: the one before it is used" for complaint in complaints]
        complaints.append(f"{folder.name} is damaged ({state})")
    if complaints:
        raise ResumeError(
            f"{run_dir} cannot be gone on with, since none of its checkpoints is whole:\n"
            + "\n".join(f"  - {complaint}" for complaint in complaints)
            + f"\nBring one back from a copy, or remove {run_dir / 'checkpoints'} to train from the beginning."
        )
    return None, []


def _read_state(folder: Path) -> dict[str, Any] | str:
    """Return what state.json says of a checkpoint, or what is wrong with the checkpoint, in words."""
    damage = find_damage(folder, needed=(*trained_files(folder), _OPTIMIZER, _STATE))
    return ", ".join(damage) or json.loads((folder / _STATE).read_text(encoding="utf-8"))


def load_checkpoint(
    checkpoint: Checkpoint,
    model: PeftModel | PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    team: Team = ALONE,
) -> None:
    """Put the saved weights, moments and (for float16) loss scale into ``model``, ``optimizer`` and ``scaler``.

    Only the first process of a ``team`` reads ``checkpoint.folder``; the others get what it read.

    Raises:
        ResumeError: the checkpoint was written with another adapter.
    """
    if scaler.is_enabled():
        scaler.load_state_dict(checkpoint.scaler)
    saved = load(team.read(checkpoint.folder / _OPTIMIZER))
    for name, parameter in _trained(model):
        moments = {key: saved.get(f"{key}.{name}") for key in ("exp_avg", "exp_avg_sq", "step")}
        missing = [key for key, value in moments.items() if value is None]
        if len(missing) == len(moments) and scaler.is_enabled():
            continue  # float16 has left out every step so far
        if missing or moments["exp_avg"].shape != parameter.shape:  # type: ignore[union-attr]
            raise ResumeError(
                f"{checkpoint.folder} has no optimizer state for {name} of shape {tuple(parameter.shape)}: it was "
                "written with other method settings. Use the settings of that run, or start a new run.name."
            )
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in moments.items()}  # type: ignore[union-attr]
    if is_saved_as_trained(model):
        if team.is_first:
            restore_trained(model, checkpoint.folder)
        team.copy_from_first([parameter for _, parameter in _trained(model)])
        return
    load_trained_numbers(model, _without_prefix(saved, _NUMBERS))
    config = team.from_first(lambda: read_adapter_config(checkpoint.folder / ADAPTER))
    restore_method_state(model, _without_prefix(saved, _METHOD), config)


def _optimizer_tensors(
    model: PeftModel | PreTrainedModel, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in _trained(model):
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value.detach().cpu().contiguous()
    if not is_saved_as_trained(model):
        tensors |= {f"{_NUMBERS}{n}": p.detach().cpu().clone() for n, p in _trained(model)}
        tensors |= {f"{_METHOD}{n}": t.detach().cpu().contiguous() for n, t in method_state(model).items()}
    return tensors


def _without_prefix(saved: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}


def _trained(model: PeftModel | PreTrainedModel) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
