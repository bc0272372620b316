"""Push a run to the Hub: its adapter, a proven merge of it, or its data; looked through first, whole or not at all.

    run/adapter/*, run.json -> a folder as the Hub shows it, with a card -> secrets? finite? proven? -> one commit

Without ``--public`` the repository is private. run.json travels with the adapter, so that it is asked by its recipe
wherever it is pulled; absolute paths in it are cut to their last part.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from rich.filesize import decimal

from lorasmith.data.prompts import PromptRecipe
from lorasmith.data.sources import LocalFile, open_source
from lorasmith.errors import ExportError, HubError
from lorasmith.export.card import base_on_hub, make_card, make_data_card, read_report
from lorasmith.export.chat_template import chat_template
from lorasmith.export.secrets import (
    Finding,
    cut_places,
    find_in_data,
    find_in_text,
    first_findings,
    without_places,
)
from lorasmith.files import CHECKSUMS, find_damage, sha256_of, write_checksums
from lorasmith.model.adapter_folder import CONFIG, WEIGHTS, check_finite_weights, read_adapter_config
from lorasmith.model.base import BaseRef, fingerprint_weights, weight_files
from lorasmith.model.found import MERGED_FILE, Tell, fingerprint_adapter, say_nothing
from lorasmith.model.hub import hub_faults
from lorasmith.model.run_record import RunRecord, how_to_finish, read_run_record
from lorasmith.model.trained import ADAPTER, MODEL

_CHAT_TEMPLATE = "chat_template.jinja"  # as transformers calls it
_TEXTS = (".md", ".json", ".jsonl", ".txt", ".csv", ".jinja", ".yaml", ".yml")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "*.index.json")  # large, and of the base's authors
_OURS = ("run.json", MERGED_FILE)  # in a repository: that lorasmith pushed it
_REPLACED = ("*.safetensors", "*.safetensors.index.json", CONFIG, "run.json", MERGED_FILE, CHECKSUMS)
# Beside the weights, in the repository of a whole model.
_OF_A_MODEL = (
    "config.json",
    "generation_config.json",
    "merge_proof.json",
    "instruct_pipeline.py",
    _CHAT_TEMPLATE,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class Parcel:
    """What would be pushed: files below ``folder`` (name, bytes), and what was found in them and in the data."""

    folder: Path
    repo_type: Literal["model", "dataset"]
    title: str
    files: tuple[tuple[str, int], ...]
    findings: tuple[Finding, ...]

    @property
    def num_bytes(self) -> int:
        return sum(size for _, size in self.files)


@dataclass(frozen=True)
class Pushed:
    """Where it lies now: the page, and the commit."""

    url: str
    commit: str


@contextmanager
def prepare(
    run: str | Path,
    place: str,
    *,
    merged: str | Path | None = None,
    data: bool = False,
    license: str | None = None,
) -> Iterator[Parcel]:
    """Yield what a push of ``run`` to ``place`` (owner/name) would send; the Hub is not asked.

    ``merged`` is the merged folder to push in place of the adapter; ``data`` pushes the training data.

    Raises:
        HubError: no OWNER/NAME, unfinished, an unproven merge, no data. RunError, AdapterError: not a run, damaged,
            not finite.
    """
    _check_name(place)
    run_dir = Path(run)
    record = read_run_record(run_dir)
    if record.result is None:
        raise HubError(f"The run {run_dir} has not been trained to its end. {how_to_finish(run_dir)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        public = _made_public(record)
        report = read_report(run_dir / "report.json")
        if report:
            report["notes"] = [cut_places(note) for note in report["notes"]]
        if data:
            title = "data set"
            card = make_data_card(public, _stage_data(record, folder), license)
        else:
            title = "adapter" if merged is None else "merged model"
            if merged is None:
                _stage_run(run_dir, record, public, folder)
            else:
                _stage_merged(Path(merged), run_dir, folder)
            model = folder if (folder / "config.json").exists() else _folder_of(record.base)
            card = make_card(
                public,
                report,
                place=place,
                is_merged=merged is not None,
                has_gguf=_has_gguf(model),
                license=license,
            )
        (folder / "README.md").write_text(card, "utf-8")
        files = tuple((path.relative_to(folder).as_posix(), path.stat().st_size) for path in _files(folder))
        yield Parcel(
            folder,
            "dataset" if data else "model",
            title,
            files,
            first_findings(_look_through(folder, record)),
        )


def send(
    parcel: Parcel, place: str, *, is_public: bool = False, overwrite: bool = False, tell: Tell = say_nothing
) -> Pushed:
    """Send a parcel to the Hub as one commit, and check there that every file arrived.

    huggingface_hub tries each request again where the connection breaks off, and sends no file that is there.

    Raises:
        HubError: not logged in, not allowed, taken, public where it must not be, or broken off; nothing changed then.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api, kind = HfApi(library_name="lorasmith"), parcel.repo_type
    with hub_faults(place):
        parent, old = None, set[str]()
        try:
            there: Any = api.repo_info(place, repo_type=kind)
        except RepositoryNotFoundError:
            api.create_repo(place, repo_type=kind, private=not is_public)
            tell(f"Made {place}, {'public' if is_public else 'private'}.")
        else:
            parent, old = there.sha, {file.rfilename for file in there.siblings or ()} - {".gitattributes"}
            _check_taken(place, there.private, old, is_public, overwrite)
        names = {name for name, _ in parcel.files}
        stale = sorted(n for n in old - names if any(fnmatch(n, pattern) for pattern in _REPLACED))
        if kind == "model" and "config.json" in old - names:  # a whole model's, whose place an adapter takes
            stale += sorted(n for n in old - names if any(fnmatch(n, pattern) for pattern in _OF_A_MODEL))
        tell(f"Sending {len(names)} files, {decimal(parcel.num_bytes)} ...")
        operations: list[Any] = [CommitOperationDelete(name) for name in stale]
        operations += [CommitOperationAdd(name, (parcel.folder / name).resolve()) for name in sorted(names)]
        message = f"Push {parcel.title} with lorasmith"
        done = api.create_commit(
            place, operations, commit_message=message, repo_type=kind, parent_commit=parent
        )
        commit = str(done.oid)
        arrived: Any = api.repo_info(place, repo_type=kind, revision=commit, files_metadata=True)
    found = {file.rfilename: file for file in arrived.siblings or ()}
    for name, size in parcel.files:
        file = found.get(name)
        same_sum = file is not None and (
            file.lfs is None or file.lfs.sha256 == sha256_of(parcel.folder / name)
        )
        if file is None or file.size not in (None, size) or not same_sum:
            raise HubError(f"{name} did not arrive whole at {place}. Push again.")
    prefix = "datasets/" if kind == "dataset" else ""
    return Pushed(f"{api.endpoint}/{prefix}{place}", commit)


def refuse_findings(parcel: Parcel) -> None:
    """Raise HubError that shows what was found.

    Raises:
        HubError: there is something.
    """
    if parcel.findings:
        shown = "\n".join(f"  {finding}" for finding in parcel.findings[:10])
        more = f"\n  and {len(parcel.findings) - 10} more" if len(parcel.findings) > 10 else ""
        raise HubError(
            f"This may not be for others' eyes, in the files or in what the model was trained on:\n{shown}{more}\n"
            "A model can repeat what it learned. Take it out of the data and train again; or, if all of it may be "
            "known, pass --despite-findings."
        )


def _check_name(place: str) -> None:
    """Refuse what the Hub cannot call a repository; without an owner it would make one and then not find it."""
    from huggingface_hub.utils import validate_repo_id

    with hub_faults(place):
        validate_repo_id(place)
    if "/" not in place:
        raise HubError(f"{place} has no owner: a place on the Hub is OWNER/NAME, such as anna/{place}.")


def _made_public(record: RunRecord) -> RunRecord:
    base = record.base
    if base.revision is None and Path(base.id).is_absolute():
        base = BaseRef(Path(base.id).name, None, base.fingerprint)
    return record.model_copy(
        update={
            "base": base,
            "settings": without_places(record.settings),
            "data": without_places(record.data),
        }
    )


def _stage_run(run_dir: Path, record: RunRecord, public: RunRecord, folder: Path) -> None:
    if record.settings.get("method", {}).get("name") == "full":
        model = run_dir / MODEL
        if damage := find_damage(model, needed=("config.json",)):
            raise HubError(f"The model {model} is damaged: {', '.join(damage)}. It is not pushed.")
        check_finite_weights(weight_files(model))
        _link(model, folder)
        # The base's own template, and sums with it: links, through which the run's files would be written over.
        for name in (_CHAT_TEMPLATE, CHECKSUMS):
            (folder / name).unlink(missing_ok=True)
        template = chat_template(PromptRecipe.from_json(record.recipe))
        (folder / _CHAT_TEMPLATE).write_text(template, "utf-8")
        (folder / MERGED_FILE).write_text(json.dumps({"recipe": record.recipe}, indent=2) + "\n", "utf-8")
        write_checksums(folder)
        return
    adapter = run_dir / ADAPTER
    config = read_adapter_config(adapter)  # refuses what is damaged or not finite
    config["base_model_name_or_path"] = base_on_hub(record) or public.base.id
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    (folder / WEIGHTS).symlink_to((adapter / WEIGHTS).absolute())
    (folder / "run.json").write_text(public.model_dump_json(indent=2) + "\n", "utf-8")
    write_checksums(folder)


def _stage_merged(merged: Path, run_dir: Path, folder: Path) -> None:
    """Link a merged folder's files, once its proof is found to be of these weights and this run."""
    try:
        about = json.loads((merged / MERGED_FILE).read_text("utf-8"))
        proof = json.loads((merged / "merge_proof.json").read_text("utf-8"))
        faults, of_adapter, of_weights = proof["faults"], about["adapter"]["sha256"], about["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise HubError(
            f"{merged} holds no proof that it is base + adapter ({fault}), so it is not pushed. "
            f"Merge with proof: lorasmith merge --run {run_dir} --out DIR"
        ) from fault
    if faults:
        raise HubError(f"The proof of {merged} failed, so it is not pushed: {'; '.join(faults)}.")
    if of_adapter != fingerprint_adapter(run_dir / ADAPTER):
        raise HubError(
            f"{merged} was merged from another adapter than that of {run_dir}. Merge this run again."
        )
    if of_weights != fingerprint_weights(merged):
        raise HubError(f"The weights in {merged} have changed since they were proven. Merge again.")
    check_finite_weights(weight_files(merged))
    _link(merged, folder)
    about["base"] = without_places(about["base"])
    (folder / MERGED_FILE).unlink()
    (folder / MERGED_FILE).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _folder_of(base: BaseRef) -> Path | None:
    """Return the folder of a base that lies on this machine as the Hub or the user has it; else None."""
    if base.revision is None:
        return Path(base.id) if (Path(base.id) / "config.json").is_file() else None
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(base.id, "config.json", revision=base.revision)
    return Path(file).parent if isinstance(file, str) else None


def _has_gguf(model: Path | None) -> bool:
    """Return whether lorasmith export writes the model; without a folder to look into it is taken for a Llama.

    The built-in base and .gguf files have none, and are Llamas.
    """
    from lorasmith.export.gguf import read_llama_config

    try:
        return model is None or read_llama_config(model) is not None
    except ExportError:
        return False


def _stage_data(record: RunRecord, folder: Path) -> list[str]:
    train = record.settings.get("data", {}).get("train")
    if not train or not Path(train).exists():
        raise HubError(
            f"The training data of {record.name} ({train}) are not on this machine: nothing to push."
        )
    source = open_source(train, kind=record.row_kind)
    if source.fingerprint() != record.data.get("fingerprint"):
        raise HubError(
            f"The training data in {train} have changed since the run {record.name} was trained on them."
        )
    files = [file for file in source.files if isinstance(file, LocalFile)]
    # The card and our own file must not take their names: written over a link, they would be in the user's own file.
    taken = ("readme.md", MERGED_FILE)
    below = "data/" if any(file.name.lower() in taken for file in files) else ""
    names = [below + file.name for file in files]
    for name, file in zip(names, files, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(file.path.absolute())
    about = {"run": record.name, "data": {"fingerprint": record.data["fingerprint"], "files": names}}
    (folder / MERGED_FILE).write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return names


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _link(source: Path, folder: Path) -> None:
    for path in source.iterdir():
        if path.is_file() and not path.name.startswith(".") and path.name != "README.md":
            (folder / path.name).symlink_to(path.absolute())


def _look_through(folder: Path, record: RunRecord) -> Iterator[Finding]:
    for path in _files(folder):
        is_text = path.suffix in _TEXTS and not any(fnmatch(path.name, name) for name in _VOCABULARIES)
        if is_text:
            yield from find_in_text(path.read_text("utf-8", errors="replace"), path.name)
    train = record.settings.get("data", {}).get("train")
    if train and Path(train).exists():
        yield from find_in_data(train, record.row_kind)


def _check_taken(place: str, is_private: bool, old: set[str], is_public: bool, overwrite: bool) -> None:
    if not is_private and not is_public:
        raise HubError(
            f"{place} is there already, and public: what is pushed would be seen by everybody. Pass --public if that "
            "is meant, or choose another name."
        )
    if old and not overwrite and not old & set(_OURS):
        raise HubError(
            f"{place} holds {len(old)} files that lorasmith did not push, such as {min(old)}. Choose another name, or "
            "pass --overwrite to add a commit on top; the Hub keeps the earlier one."
        )
