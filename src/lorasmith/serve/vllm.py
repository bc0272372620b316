"""The same models in vLLM, which is the way past one machine: its command line, and why it would refuse.

vLLM lives in an environment of its own and is not imported. What it refuses or, worse, ignores in an adapter is in
its ``vllm/lora/peft_helper.py``, the ranks it takes (VLLM_RANKS) in ``vllm/config/lora.py`` (read in 0.27).
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasmith.data.cache import cache_dir
from lorasmith.data.prompts import PromptRecipe
from lorasmith.errors import AdapterError, BaseModelError, RecipeError, SettingsError
from lorasmith.export.card import VLLM_RANKS
from lorasmith.export.chat_template import chat_template
from lorasmith.files import whole_folder
from lorasmith.model.adapter_folder import read_adapter_config
from lorasmith.model.found import FoundModel, Tell, find_adapted, find_model, say_nothing
from lorasmith.serve.models import short_name
from lorasmith.serve.settings import ServeSettings


@dataclass(frozen=True)
class VllmServer:
    """``words`` are the command; ``notes`` say what it cannot be told."""

    words: tuple[str, ...]
    notes: tuple[str, ...]


def plan_vllm(
    runs: Sequence[tuple[str, Path]],
    settings: ServeSettings,
    *,
    base: str | None = None,
    base_name: str | None = None,
    tell: Tell = say_nothing,
) -> VllmServer:
    """Return the ``vllm serve`` that asks each run by its own recipe; its template and end tokens become files.

    Raises:
        SettingsError: there is nothing to serve. AdapterError: vLLM refuses an adapter, or would compute another.
        RecipeError: two runs have other recipes; vLLM has one chat template a server.
        BaseModelError: the runs stand on other bases.
    """
    found = [find_adapted(folder, base=base, tell=tell) for _, folder in runs]
    if not found and base is None:
        raise SettingsError("Nothing to serve. Name runs (--run runs/faq), a base model (--base), or both.")
    first = found[0] if found else find_model(str(base), tell=tell)
    for other in found[1:]:
        _check_alike(first, other)
    ranks = [_check_adapter(name, model) for (name, _), model in zip(runs, found, strict=True)]
    folder = _write_files(first)
    words = [
        *("vllm", "serve", first.base.portable_name),
        *("--served-model-name", base_name or short_name(first.base.ref.id)),
        *("--host", settings.host, "--port", str(settings.port)),
        *("--chat-template", str(folder / "chat_template.jinja")),
        *("--generation-config", str(folder)),
        *("--override-generation-config", '{"temperature": 0}'),  # as lorasmith asks where nothing is said
    ]
    if found:
        adapters = [
            f"{name}={model.adapter and model.adapter.resolve()}"
            for (name, _), model in zip(runs, found, strict=True)
        ]
        words += ["--enable-lora", "--max-loras", str(len(found)), "--max-lora-rank", str(max(ranks))]
        words += ["--lora-modules", *adapters]
    return VllmServer(tuple(words), tuple(_notes(first.recipe, settings)))


def _check_alike(first: FoundModel, other: FoundModel) -> None:
    if first.base.ref.fingerprint != other.base.ref.fingerprint:
        raise BaseModelError(
            f"{first.name} stands on {first.base.ref.id} and {other.name} on {other.base.ref.id}. "
            "A server has one base: start one for each."
        )
    if chat_template(first.recipe) != chat_template(other.recipe):
        raise RecipeError(
            f"{first.name} and {other.name} were trained with other prompt recipes, and vLLM has one chat template a "
            "server. Start one for each recipe; lorasmith's own server takes both."
        )


def _check_adapter(name: str, found: FoundModel) -> int:
    """Return the rank that vLLM must be told to make room for."""
    if found.adapter is None:
        raise AdapterError(f"{name} is a whole model. Serve it alone: --base {found.base.folder}.")
    config = read_adapter_config(found.adapter)
    reasons = {
        "use_dora": "it is a DoRA adapter",
        "modules_to_save": "it keeps whole layers of its own (modules_to_save)",
        "lora_bias": "it has biases",
        "rank_pattern": "its layers have unlike ranks (rank_pattern), and vLLM scales all alike",
        "alpha_pattern": "its layers are scaled unlike (alpha_pattern), and vLLM scales all alike",
    }
    why = [text for key, text in reasons.items() if config.get(key)]
    if config["peft_type"] != "LORA":
        why = [f"its method is {config['peft_type']}"]
    elif config["r"] > VLLM_RANKS[-1]:
        why.append(f"its rank is {config['r']}, and {VLLM_RANKS[-1]} is vLLM's largest")
    if why:
        raise AdapterError(
            f"vLLM does not take the adapter {name}: {'; '.join(why)}. Merge it and serve the merged folder: "
            "lorasmith merge, then lorasmith serve --engine vllm --base MERGED."
        )
    return next(rank for rank in VLLM_RANKS if rank >= config["r"])


def _write_files(found: FoundModel) -> Path:
    """Write the recipe's chat template and end tokens where vLLM will read them; the same ones only once."""
    template = chat_template(found.recipe)
    ends = list(found.recipe.stop_token_ids(found.tokenizer))
    about = json.dumps({"eos_token_id": ends if len(ends) > 1 else ends[0]})
    digest = hashlib.sha256((template + about).encode()).hexdigest()[:16]
    folder = cache_dir() / "vllm" / digest
    if not folder.is_dir():
        with whole_folder(folder) as part:
            (part / "chat_template.jinja").write_text(template, encoding="utf-8")
            (part / "generation_config.json").write_text(about, encoding="utf-8")
    return folder


def _notes(recipe: PromptRecipe, settings: ServeSettings) -> list[str]:
    notes = ["API keys: set VLLM_API_KEY in vLLM's environment; they do not belong on a command line."]
    if strings := [stop for stop in recipe.stop if stop not in recipe.special_tokens]:
        notes.append(
            f"vLLM has no stop strings of a server's own: clients must send stop={json.dumps(strings)}."
        )
    if own := settings.model_dump(exclude_defaults=True, exclude={"host", "port"}):
        notes.append(f"Settings of lorasmith's own server that vLLM is not told of: {', '.join(own)}.")
    if recipe.system is not None:
        notes.append(
            "A request with another system prompt than the trained one is answered, not refused as here."
        )
    return notes
