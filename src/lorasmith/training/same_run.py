"""Whether a run folder holds the run that is asked for, and where that run goes on."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorasmith.data.settings import DataSettings
from lorasmith.data.sources import open_source
from lorasmith.engine.settings import EngineSettings
from lorasmith.errors import ResumeError, RunError
from lorasmith.model.base import resolve_base
from lorasmith.model.run_record import RunRecord, read_run_record
from lorasmith.model.settings import BaseSettings
from lorasmith.training.checkpoint import Checkpoint, last_checkpoint
from lorasmith.training.distributed import Team
from lorasmith.training.settings import ObjectiveSettings, OutputSettings, objective_defaults


def is_finished(
    run_dir: Path, settings: dict[str, Any], data: DataSettings, objective: ObjectiveSettings
) -> bool:
    """Return whether ``run_dir`` holds this very run, trained to its end.

    Raises:
        RunError: it holds a finished run of other settings or data.
    """
    if not (run_dir / "run.json").is_file() or (record := read_run_record(run_dir)).result is None:
        return False
    differences = setting_differences(record.settings, settings)
    source = open_source(data.train, split=data.split, kind=objective.kind)
    if source.fingerprint() != record.data["fingerprint"]:
        differences.append(f"data: {data.train} has changed since")
    if data.validation is not None:
        source = open_source(data.validation, split=data.split, kind=objective.kind)
        if source.fingerprint() != record.data.get("validation_fingerprint"):
            differences.append(f"data.validation: it was another then than {data.validation}")
    elif record.data.get("validation_fingerprint") is not None:
        differences.append(f"data.validation: {record.settings['data']['validation']} then, none now")
    if settings["base"]["model"] != record.settings["base"]["model"]:
        # Another place of the same weights will do.
        fingerprint = resolve_base(BaseSettings.model_validate(settings["base"])).ref.fingerprint
        if fingerprint != record.base.fingerprint:
            differences.append(
                f"base.model: {record.settings['base']['model']} then, {settings['base']['model']} now, other weights"
            )
    if differences:
        raise RunError(
            f"{run_dir} is a finished run with other settings:\n"
            + "\n".join(f"  - {line}" for line in differences)
            + "\nGive the new run a name of its own: run.name=NAME (or remove the folder)."
        )
    return True


def what_to_resume(
    run_dir: Path,
    old: RunRecord | None,
    record: RunRecord,
    output: OutputSettings,
    say: Callable[[str], None],
    team: Team,
) -> Checkpoint | None:
    """Return the checkpoint to go on from, or None for a new run; refuse a run that was started otherwise."""
    if old is None:
        return None
    if output.resume == "never":
        raise RunError(
            f"{run_dir} is there already. Choose another run.name, or run.resume=auto to go on with it."
        )
    differences = _differences(old, record)
    if differences:
        raise ResumeError(
            f"{run_dir} was started with other settings, so it cannot be gone on with:\n"
            + "\n".join(f"  - {line}" for line in differences)
            + "\nUse the settings of that run, or start a new one with run.name=NAME."
        )

    def find() -> dict[str, Any] | None:
        checkpoint, complaints = last_checkpoint(run_dir)
        for complaint in complaints:
            say(f"Warning: {complaint}")
        return None if checkpoint is None else {**asdict(checkpoint), "folder": str(checkpoint.folder)}

    found = team.from_first(find)
    checkpoint = None if found is None else Checkpoint(**{**found, "folder": Path(found["folder"])})
    if checkpoint is None:
        say("The run has no checkpoint yet: it starts from the beginning")
    else:
        say(
            f"Going on from step {checkpoint.step} ({checkpoint.folder}); its next-token loss of "
            f"{checkpoint.probe_loss:.4f} on an example of that step is computed again and must be the same"
        )
    return checkpoint


# What may differ between the two halves of a run: nothing here changes more than the rounding of a weight.
_HARMLESS = {
    ("training", "keep_checkpoints"),
    ("training", "save_every"),
    ("base", "device"),
    ("base", "model"),  # what it holds is compared, by its fingerprint
    ("data", "cache_dir"),
    ("data", "train"),  # likewise
    ("data", "validation"),
    *(("engine", key) for key in EngineSettings.model_fields),
    ("training", "micro_batch_size"),
    ("training", "micro_batch_tokens"),
}


# What runs meant that are older than the setting.
_BEFORE = {("method", "name"): "lora", ("objective", "name"): "sft", ("base", "quantization"): "none"}


def _differences(old: RunRecord, new: RunRecord) -> list[str]:
    found = []
    if old.base.fingerprint != new.base.fingerprint:
        found.append(f"base: weights {old.base.fingerprint[:12]} then, {new.base.fingerprint[:12]} now")
    if old.data["fingerprint"] != new.data["fingerprint"]:
        found.append(f"data: {old.data['source']} has changed since")
    if old.data.get("validation_fingerprint") != new.data["validation_fingerprint"]:
        found.append("data.validation: it has changed since")
    if old.data.get("tokenizer_fingerprint") != new.data["tokenizer_fingerprint"]:
        found.append("base: its tokenizer has changed since")
    if old.recipe["fingerprint"] != new.recipe["fingerprint"]:
        found.append("prompt: it renders another text than then")
    return found + setting_differences(old.settings, new.settings)


def setting_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the settings that differ and matter, in words. "auto" now agrees with whatever it was found to be."""
    harmless = _HARMLESS
    if new["method"].get("lora_dropout"):  # another cut into packs draws other masks
        harmless = harmless - {("training", "micro_batch_size"), ("training", "micro_batch_tokens")}
    found = []
    for section, values in new.items():
        for key, value in values.items():
            before = old.get(section, {}).get(key, _BEFORE.get((section, key)))
            if section in ("run", "report") or (section, key) in harmless:
                continue
            if section == "objective":  # a default that is written out is none the less the default
                defaults = objective_defaults(values["name"])
                before, value = (defaults.get(key) if v is None else v for v in (before, value))
            if before != value and value != "auto":
                found.append(f"{section}.{key}: {before} then, {value} now")
    return found
