"""The models that are served: one base, and the adapters on it, each asked by its own recipe."""

import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from lorasmith.data.prompts import PromptRecipe
from lorasmith.errors import AdapterError, BaseModelError, SettingsError
from lorasmith.generation.chat import Chat
from lorasmith.model.device import choose_device
from lorasmith.model.found import FoundModel, Tell, find_adapted, find_model, say_nothing
from lorasmith.serve.adapters import LoraWeights, read_lora

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")


@dataclass(frozen=True, eq=False)
class ServedModel:
    """What a request's ``model`` names. ``chat`` renders its prompts and knows where its answers end."""

    name: str
    parent: str | None  # None: the base itself
    root: str
    chat: Chat
    adapter: LoraWeights | None
    created: int


class ServedModels:
    """The base and its adapters by name, in the order they came. Adapters may come and go."""

    def __init__(self, base: ServedModel, model: PreTrainedModel, *, max_models: int) -> None:
        self.base, self.model = base, model
        self._max_models = max_models
        self._by_name = {base.name: base}
        self._turn = threading.Lock()

    def list(self) -> "list[ServedModel]":
        """Return the adapters in the order they were loaded, then the base."""
        with self._turn:
            return [*list(self._by_name.values())[1:], self.base]

    def find(self, name: str) -> ServedModel | None:
        return self._by_name.get(name)

    def load(
        self, name: str, folder: Path, *, replaces: bool = False, tell: Tell = say_nothing
    ) -> ServedModel:
        """Serve the run or adapter in ``folder`` as ``name``.

        Raises:
            SettingsError: the name is taken, or too many are served. LorasmithError: it cannot be served here.
        """
        self._check_name(name, replaces)
        found = find_adapted(folder, base=str(self._folder), tell=tell)
        loaded = self._serve(name, found, folder)
        with self._turn:
            self._check_name(name, replaces)
            self._by_name[name] = loaded
        return loaded

    @property
    def _folder(self) -> Path:
        found = self.base.chat.found
        assert found is not None
        return found.base.folder

    def _serve(self, name: str, found: FoundModel, folder: Path) -> ServedModel:
        if found.adapter is None:
            raise AdapterError(
                f"The run {folder} trained every weight of its base, so it shares none with others. Serve it alone: "
                f"lorasmith serve --run {folder}."
            )
        weights = read_lora(self.model, found.adapter)
        chat = Chat(self.model, found.tokenizer, found.recipe, name=name, notes=found.notes, found=found)
        return ServedModel(name, self.base.name, str(folder), chat, weights, int(time.time()))

    def _check_name(self, name: str, replaces: bool) -> None:
        if not _NAME.fullmatch(name):
            raise SettingsError(
                f"{name!r:.140} cannot be a model's name: a letter or digit, then also . _ : / and -"
            )
        if name in self._by_name and (not replaces or name == self.base.name):
            raise SettingsError(f"The name {name} is taken by a model that is served. Choose another.")
        if name not in self._by_name and len(self._by_name) >= self._max_models:
            raise SettingsError(
                f"{len(self._by_name)} models are served, as many as max_models allows. Unload one first."
            )

    def unload(self, name: str) -> ServedModel | None:
        """Stop serving an adapter; answers under way go on. None if there is no adapter of that name."""
        with self._turn:
            return None if name == self.base.name else self._by_name.pop(name, None)


def open_models(
    runs: Sequence[tuple[str, Path]],
    *,
    base: str | None = None,
    base_name: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    recipe: PromptRecipe | None = None,
    max_models: int = 64,
    tell: Callable[[str], None] = say_nothing,
) -> ServedModels:
    """Load the base once and every run on it. Without ``base``, it is the first run's.

    Raises:
        SettingsError: neither runs nor a base. LorasmithError: one of them cannot be opened, or is of another base.
    """
    if base is None:
        if not runs:
            raise SettingsError(
                "Nothing to serve. Name runs (--run runs/faq), a base model (--base), or both."
            )
        (run_name, folder), *others = runs
        found = find_adapted(folder, tell=tell)
        if found.adapter is None and not others:  # it trained every weight, and is a base itself
            base, base_name, runs = str(folder), base_name or run_name, ()
        else:
            base, base_name = str(found.base.folder), base_name or short_name(found.base.ref.id)
    bare = find_model(base, recipe=recipe, tell=tell)
    if bare.adapter is not None:
        raise BaseModelError(f"{base} is an adapter, not a base model. Serve it with --run {base}.")
    model = bare.load(choose_device(device, dtype))
    assert isinstance(model, PreTrainedModel)
    name = base_name or short_name(bare.base.ref.id)
    chat = Chat(model, bare.tokenizer, bare.recipe, name=name, notes=bare.notes, found=bare)
    served = ServedModels(
        ServedModel(name, None, str(bare.base.folder), chat, None, int(time.time())),
        model,
        max_models=max_models,
    )
    for run_name, folder in runs:
        tell(f"Loading {folder} as {run_name} ...")
        served.load(run_name, folder, tell=tell)
    return served


def short_name(id: str) -> str:
    """Return what a base is called in requests where nobody says: a Hub id as it is, a folder by its last part."""
    return Path(id).name if Path(id).is_absolute() else id


def find_allowed(folder: Path, allowed: Sequence[Path]) -> Path:
    """Return ``folder`` with all links followed, if it lies inside one of ``allowed``.

    Raises:
        AdapterError: it does not.
    """
    try:
        place = folder.resolve()
    except (OSError, RuntimeError, ValueError):  # a name too long, a loop of links, a zero byte
        place = None
    if place is None or not any(place.is_relative_to(root.expanduser().resolve()) for root in allowed):
        raise AdapterError(
            f"{str(folder)!r:.300} is not in a folder that this server loads adapters from. Start it with "
            "--adapter-folder FOLDER."
        )
    return place


def name_runs(words: Sequence[str]) -> list[tuple[str, Path]]:
    """Return (name, folder) of each word: NAME=FOLDER, or a folder, which is called by its last part.

    A run's adapter and a checkpoint's are called by the run: runs/faq/adapter is faq.
    """
    return [_name_run(word) for word in words]


def _name_run(word: str) -> tuple[str, Path]:
    name, separator, folder = word.partition("=")
    if separator:
        return name, Path(folder)
    place = Path(word).absolute()
    return (place.parent.name if place.name == "adapter" else place.name), Path(word)
