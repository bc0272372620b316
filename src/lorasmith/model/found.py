"""Find what can be asked, merged or evaluated, and how it was trained to be asked; no weights are loaded yet.

runs/x                       run.json knows base and recipe; the adapter is runs/x/adapter
runs/x/checkpoints/*/adapter the same run, that adapter
runs/x/model                 after full fine-tuning: a whole model
a plain PEFT folder          names its base; its recipe is chosen, and that is said
a merged folder              a whole model; lorasmith.json holds the recipe
a model's folder or Hub id   a whole model; its recipe is chosen, and that is said
owner/name on the Hub        a pushed run, a plain adapter or a model, fetched and then the same
"""

import difflib
import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorasmith.data.prompts import PromptRecipe, choose_recipe
from lorasmith.data.settings import PromptSettings
from lorasmith.errors import AdapterError, BaseModelError, RecipeError, RunError
from lorasmith.files import find_damage, sha256_of
from lorasmith.model.adapter import load_adapter
from lorasmith.model.adapter_folder import WEIGHTS, named_base, read_adapter_config
from lorasmith.model.base import (
    BaseRef,
    ResolvedBase,
    Tell,
    check_same_base,
    load_base,
    load_tokenizer,
    reopen_base,
    resolve_base,
    say_nothing,
)
from lorasmith.model.device import DeviceChoice
from lorasmith.model.hub import pull_adapter, reads_as_hub_id
from lorasmith.model.run_record import RunRecord, how_to_finish, read_run_record
from lorasmith.model.settings import BUILT_IN, BaseSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MERGED_FILE = "lorasmith.json"  # in a merged folder: what it was made of and how it is asked
PIPELINE_TASK = "instruction-text-generation"  # what a merged folder is to transformers.pipeline


@dataclass(frozen=True)
class FoundModel:
    """A base, perhaps an adapter on it, and the prompt recipe they are asked with.

    ``tuned_from`` is what a model whose own weights were trained began as. ``notes`` say what a user
    should know about it: a recipe that had to be chosen, for one.
    """

    name: str
    base: ResolvedBase
    adapter: Path | None
    recipe: PromptRecipe
    tokenizer: "PreTrainedTokenizerBase"
    record: RunRecord | None = None
    tuned_from: BaseRef | None = None
    notes: tuple[str, ...] = ()

    @property
    def trust_remote_code(self) -> bool:
        return self.record is not None and _trusts(self.record)

    def fingerprint(self) -> str:
        """Return a sha256 of the weights that answer: those of the base, and the adapter's file."""
        digest = hashlib.sha256(self.base.ref.fingerprint.encode())
        if self.adapter is not None:
            digest.update(fingerprint_adapter(self.adapter).encode())
        return digest.hexdigest()

    def before_tuning(self) -> "FoundModel":
        """Return what answers without the training: the base alone, with the same recipe."""
        if self.tuned_from is None:
            return replace(self, adapter=None)
        origin = reopen_base(self.tuned_from, trust_remote_code=self.trust_remote_code)
        return replace(self, base=origin, tuned_from=None)

    def load(self, choice: DeviceChoice) -> "PreTrainedModel | PeftModel":
        """Return the model on the chosen device, its adapter attached, frozen and in eval mode."""
        model = load_base(self.base, choice, trust_remote_code=self.trust_remote_code)
        return model if self.adapter is None else load_adapter(model, self.adapter)


def fingerprint_adapter(adapter: Path) -> str:
    """Return the sha256 of an adapter folder's weights."""
    return sha256_of(adapter / WEIGHTS)


def find_model(
    source: str | Path,
    *,
    base: str | None = None,
    recipe: PromptRecipe | None = None,
    tell: Tell = say_nothing,
) -> FoundModel:
    """Return what ``source`` names: a run folder, an adapter folder, a merged folder, or a base model.

    ``base`` says where a run's or an adapter's base model lies, if it was moved or is not named. ``recipe`` is
    for folders that do not hold their own.

    Raises:
        RunError, AdapterError, BaseModelError, RecipeError: it is not there, not whole, or not what it was.
    """
    folder = Path(source)
    if (folder / "run.json").is_file() or (folder / "adapter_config.json").is_file():
        return find_adapted(folder, base=base, recipe=recipe, tell=tell)
    _refuse_mistyped_run(folder)
    if pulled := _pull(str(source), base, recipe, tell):
        return pulled
    found = resolve_base(BaseSettings(model=str(source)), tell=tell)
    tokenizer = load_tokenizer(found)
    notes: tuple[str, ...] = ()
    if recipe is None and (found.folder / MERGED_FILE).is_file():
        recipe = _read_recipe(found.folder / MERGED_FILE)
    else:
        recipe, notes = _settle_recipe(recipe, tokenizer)
    return FoundModel(str(source), found, None, recipe, tokenizer, notes=notes)


def find_adapted(
    folder: Path, *, base: str | None = None, recipe: PromptRecipe | None = None, tell: Tell = say_nothing
) -> FoundModel:
    """Return the model of a run or an adapter, here or on the Hub, as :func:`find_model` does, and of nothing else."""
    if pulled := _pull(folder.as_posix(), base, recipe, tell):
        return pulled
    if (folder / "run.json").is_file() or not (folder / "adapter_config.json").is_file():
        # A copy from the Hub, where both lie side by side.
        is_pushed = (folder / "adapter_config.json").is_file()
        return find_run(folder, adapter=folder if is_pushed else None, base=base, tell=tell)
    for run_dir in list(folder.resolve().parents)[:3]:
        if (run_dir / "run.json").is_file():
            return find_run(run_dir, adapter=folder, base=base, tell=tell)
    return _find_adapter(folder, base, recipe, tell)


def _pull(source: str, base: str | None, recipe: PromptRecipe | None, tell: Tell) -> FoundModel | None:
    """Return the adapter that the Hub has under this name, asked by the recipe of its run.json; None: it has none."""
    folder = pull_adapter(source, tell) if reads_as_hub_id(source) else None
    if folder is None:
        return None
    if not (folder / "run.json").is_file():
        return replace(_find_adapter(folder, base, recipe, tell), name=source)
    record = read_run_record(folder)
    if base is None and record.base.revision is None and record.base.id != BUILT_IN:
        raise AdapterError(
            f"{source} was trained on {record.base.id}, a folder that is not on the Hub. Pass where that model lies "
            "here as the base (--base-model, or --base of other commands)."
        )
    if record.settings.get("base", {}).get("trust_remote_code"):
        raise AdapterError(
            f"The base of {source} runs Python code of its own, and that is not run on the word of a download. If you "
            f"trust it: hf download {source} --local-dir FOLDER, and name that folder."
        )
    found = find_run(folder, adapter=folder, base=base, tell=tell)
    return replace(found, name=source, notes=(*found.notes, f"{source} is at commit {folder.name[:12]}."))


def find_run(
    run_dir: Path, *, adapter: Path | None = None, base: str | None = None, tell: Tell = say_nothing
) -> FoundModel:
    """Return the model of a run; ``adapter`` may be that of a checkpoint.

    Raises:
        RunError: no readable run.json. BaseModelError: the weights are not those of the run. RecipeError: the
            recipe renders another text than it did then. AdapterError: there is no adapter yet.
    """
    record = read_run_record(run_dir)
    if record.settings.get("method", {}).get("name") == "full":
        return _find_full(run_dir, record)
    if adapter is None:
        adapter = run_dir / "adapter"
        if record.result is None and not adapter.is_dir():
            raise AdapterError(
                f"The run {run_dir} has not been trained to its end: it has no adapter/ yet. {how_to_finish(run_dir)}"
            )
    read_adapter_config(adapter)
    recipe = PromptRecipe.from_json(record.recipe)
    trusted = _trusts(record)
    if base is None:
        found = reopen_base(record.base, trust_remote_code=trusted, tell=tell)
    else:
        found = resolve_base(BaseSettings(model=base, trust_remote_code=trusted), tell=tell)
        check_same_base(record.base, found)
    tokenizer = load_tokenizer(found, trust_remote_code=trusted)
    return FoundModel(str(run_dir), found, adapter, recipe, tokenizer, record)


def _trusts(record: RunRecord) -> bool:
    return bool(record.settings.get("base", {}).get("trust_remote_code"))


def _find_full(run_dir: Path, record: RunRecord) -> FoundModel:
    """Return the whole model of a run that trained every weight."""
    folder = run_dir / "model"
    if not folder.is_dir():
        raise AdapterError(
            f"The run {run_dir} has not been trained to its end: it has no model/ yet. {how_to_finish(run_dir)}"
        )
    if damage := find_damage(folder, needed=("config.json",)):
        raise BaseModelError(f"The model {folder} is damaged: {', '.join(damage)}. Copy it again.")
    base = resolve_base(BaseSettings(model=str(folder)))
    recipe = PromptRecipe.from_json(record.recipe)
    tokenizer = load_tokenizer(base, trust_remote_code=_trusts(record))
    return FoundModel(str(run_dir), base, None, recipe, tokenizer, record, tuned_from=record.base)


def _find_adapter(folder: Path, base: str | None, recipe: PromptRecipe | None, tell: Tell) -> FoundModel:
    """Return a plain PEFT folder, which knows its base's name but not the recipe it was trained with."""
    name = base or named_base(read_adapter_config(folder), folder)
    found = resolve_base(BaseSettings(model=name), tell=tell)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(ResolvedBase(found.ref, folder) if has_tokenizer else found)
    why = f"{folder} has no run.json, so how it was prompted in training is not known. "
    recipe, notes = _settle_recipe(recipe, tokenizer, why)
    return FoundModel(str(folder), found, folder, recipe, tokenizer, notes=notes)


def _refuse_mistyped_run(folder: Path) -> None:
    # A Hub id has a slash too, but its first part is no folder of runs here.
    if folder.exists():
        return
    runs_beside = sorted(file.parent.name for file in folder.parent.glob("*/run.json"))
    if runs_beside:
        near = difflib.get_close_matches(folder.name, runs_beside, n=1)
        hint = f"Did you mean {folder.parent / near[0]}?" if near else f"There are: {', '.join(runs_beside)}."
        raise RunError(f"There is no run {folder.name} in {folder.parent}. {hint}")
    if str(folder) != BUILT_IN and folder.suffix != ".gguf" and not reads_as_hub_id(folder.as_posix()):
        raise RunError(
            f"{folder} is not there. A run folder holds run.json and adapter/; a model of the Hub is named owner/name."
        )


def _settle_recipe(
    recipe: PromptRecipe | None, tokenizer: "PreTrainedTokenizerBase", why: str = ""
) -> tuple[PromptRecipe, tuple[str, ...]]:
    """Return the given recipe, or the one that suits the tokenizer and a note that says so."""
    if recipe is not None:
        return recipe, ()
    chosen, reason = choose_recipe(PromptSettings(), tokenizer)
    return chosen, (f"{why}It is asked with the recipe {chosen.name}: {reason}.",)


def _read_recipe(place: Path) -> PromptRecipe:
    """Return the recipe in a merged folder's lorasmith.json."""
    try:
        return PromptRecipe.from_json(json.loads(place.read_text(encoding="utf-8"))["recipe"])
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{place} holds no prompt recipe ({error}). Merge the run again.") from error
