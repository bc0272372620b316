"""Merge: fold the adapter into its base, save a model that stands alone, prove that it answers the same."""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open

from lorasmith.data.example import Message
from lorasmith.data.prompts import PromptRecipe
from lorasmith.errors import AdapterError, MergeError
from lorasmith.export.chat_template import chat_template, count_equal_prompts
from lorasmith.export.fold import copy_remote_code, fold
from lorasmith.export.pipeline_code import write_pipeline_code
from lorasmith.export.proof import (
    NUM_QUESTIONS,
    NUM_QUESTIONS_OF_BASE,
    TOLERANCES,
    MergeProof,
    answer_greedily,
    compared_length,
    encode_questions,
    largest_difference,
    spread,
)
from lorasmith.export.questions import held_out_questions
from lorasmith.files import nearest_existing, whole_folder, write_whole
from lorasmith.model.adapter import update_norm
from lorasmith.model.base import (
    ResolvedBase,
    fingerprint_weights,
    load_base,
    load_tokenizer,
    weight_files,
)
from lorasmith.model.device import DeviceChoice, choose_device
from lorasmith.model.found import (
    MERGED_FILE,
    FoundModel,
    Tell,
    find_adapted,
    fingerprint_adapter,
    say_nothing,
)
from lorasmith.model.memory import give_back_freed_memory
from lorasmith.model.run_record import library_versions

MergeDtype = Literal["auto", "float32", "bfloat16", "float16"]

MERGED_TO_FILE = "merged_to.json"  # in a run folder: where its adapter was last merged to, for the report
SAFETENSORS_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def merge(
    run_dir: str | Path,
    out_dir: str | Path,
    *,
    base: str | None = None,
    dtype: MergeDtype = "auto",
    recipe: PromptRecipe | None = None,
    prompts: Sequence[Sequence[Message]] | None = None,
    device: str = "auto",
    overwrite: bool = False,
    records_place: bool = True,
    tell: Tell = say_nothing,
) -> MergeProof:
    """Write base + adapter as one transformers folder to ``out_dir`` and return the proof that it is both.

    ``run_dir`` is a run folder or a plain PEFT adapter folder; the latter's base is the one it names (or
    ``base``), and its recipe a guess (or ``recipe``). ``dtype`` "auto" keeps the base's own. The proof asks
    ``prompts``, else questions of the run's validation data, else of its training data, else general ones.
    Both models are compared in float32. ``records_place`` notes in the run where it was merged to.

    Raises:
        MergeError: the merged model parts from base + adapter (nothing is left then), or out_dir is taken.
        BaseModelError, AdapterError, RunError, RecipeError: what is to be merged cannot be opened.
    """
    out = Path(out_dir).absolute()
    source = find_adapted(Path(run_dir), base=base, recipe=recipe, tell=tell)
    if source.adapter is None:
        raise MergeError(
            f"{run_dir} trained every weight, so there is nothing to merge: {source.base.folder} is the whole model, "
            "with its tokenizer. Copy that folder."
        )
    for note in source.notes:
        tell(note)
    _check_place(out, source, Path(run_dir), overwrite)
    kept = None if dtype == "auto" else getattr(torch, dtype)
    questions = prompts if prompts is not None else held_out_questions(source.record, NUM_QUESTIONS)
    if not questions:
        raise MergeError("There is no question to prove the merge with. Name a file of them: --prompts FILE")
    asked = encode_questions(questions, source.recipe, source.tokenizer)
    stop_ids = source.recipe.stop_token_ids(source.tokenizer)
    compare_on = DeviceChoice(choose_device(device, "float32").device, torch.float32, "to compare")

    with whole_folder(out) as part:
        started = time.monotonic()
        way = fold(source.base, source.adapter, part, dtype=kept, trust_remote_code=source.trust_remote_code)
        _write_companions(source, part)
        fold_seconds = time.monotonic() - started
        tell(f"Folded in {fold_seconds:.1f} s ({way}). Asking both models {len(asked)} questions ...")

        started = time.monotonic()
        tuned: Any = source.load(compare_on)
        norm = update_norm(tuned)
        expected = answer_greedily(tuned, asked, stop_ids)
        with tuned.disable_adapter():
            untuned = answer_greedily(tuned, asked[:NUM_QUESTIONS_OF_BASE], stop_ids)
        effect = largest_difference(expected[:NUM_QUESTIONS_OF_BASE], untuned)
        if effect == 0:
            raise AdapterError(
                f"The adapter {source.adapter} has no effect: it changes no logit. Train it first."
            )
        del tuned
        give_back_freed_memory()

        merged_folder = ResolvedBase(source.base.ref, part)
        merged = load_base(merged_folder, compare_on, trust_remote_code=source.trust_remote_code)
        actual = answer_greedily(merged, asked, stop_ids)
        pairs = list(zip(expected, actual, strict=True))
        coarsest = _coarsest_dtype(part)
        proof = MergeProof(
            dtype=str(coarsest).removeprefix("torch."),
            way=way,
            num_questions=len(asked),
            num_positions=sum(compared_length(*pair) for pair in pairs),
            max_logit_difference=largest_difference(expected, actual),
            logit_range=spread(expected),
            adapter_effect=effect,
            num_same_answers=sum(one.tokens == other.tokens for one, other in pairs),
            num_same_prompts=count_equal_prompts(source.recipe, load_tokenizer(merged_folder), questions),
            tolerance=TOLERANCES[coarsest],
            update_norm=norm,
            fold_seconds=round(fold_seconds, 1),
            proof_seconds=round(time.monotonic() - started, 1),
        )
        if faults := proof.faults():
            raise MergeError(
                f"The merged model is not proven to be base + adapter, so it was not kept: {'; '.join(faults)}."
                + ("" if coarsest is torch.float32 else " Merge with --dtype float32.")
            )
        _write_json(part / "merge_proof.json", proof.to_json())
        _write_json(part / MERGED_FILE, _describe(source, source.adapter, part, proof))
    if records_place and (source.adapter.parent / "run.json").is_file():
        write_whole(source.adapter.parent / MERGED_TO_FILE, json.dumps({"folder": str(out)}) + "\n")
    return proof


def _check_place(out: Path, source: FoundModel, run_dir: Path, overwrite: bool) -> None:
    """Refuse an ``out`` that is taken, or whose replacement would destroy what is being merged."""
    needed = sum(file.stat().st_size for file in weight_files(source.base.folder))
    for name, folder in (
        ("the run", run_dir),
        ("the adapter", source.adapter or run_dir),
        ("the base", source.base.folder),
    ):
        if folder.resolve().is_relative_to(out.resolve()):
            raise MergeError(f"{out} is where {name} lies. Choose another folder: --out DIR")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not overwrite:
            raise MergeError(
                f"{out} exists already. Choose another folder, or pass --overwrite to replace it."
            )
        if not (out / MERGED_FILE).is_file():
            raise MergeError(
                f"{out} was not written by a merge (it has no {MERGED_FILE}): --overwrite does not replace it. "
                "Choose another folder, or remove it yourself."
            )
    parent = nearest_existing(out.parent)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise MergeError(
            f"The disk is too full: the merged model takes about {needed / 1e9:.1f} GB, and {parent} has "
            f"{free / 1e9:.1f} GB free."
        )


def _write_companions(source: FoundModel, out: Path) -> None:
    """Write what the weights need to be used as trained: tokenizer, chat template, generation defaults."""
    from transformers import GenerationConfig

    tokenizer = source.tokenizer
    tokenizer.chat_template = chat_template(source.recipe)
    tokenizer.save_pretrained(out)
    stop_ids = list(source.recipe.stop_token_ids(tokenizer))
    pad = tokenizer.pad_token_id
    GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_ids if len(stop_ids) > 1 else stop_ids[0],
        pad_token_id=stop_ids[0] if pad is None else pad,
    ).save_pretrained(out)
    if source.trust_remote_code:
        copy_remote_code(source.base, out)
    write_pipeline_code(source.recipe, out)


def _describe(source: FoundModel, adapter: Path, merged: Path, proof: MergeProof) -> dict[str, Any]:
    """Return lorasmith.json: what the folder was made of, how to ask it, and how it was proven."""
    base = source.base.ref
    return {
        "schema_version": 1,
        "run": source.record.name if source.record else None,
        "base": {"id": base.id, "revision": base.revision, "fingerprint": base.fingerprint},
        "adapter": {"sha256": fingerprint_adapter(adapter)},
        "fingerprint": fingerprint_weights(merged),
        "recipe": source.recipe.to_json(),
        "proof": proof.to_json(),
        "versions": library_versions(),
    }


def _coarsest_dtype(folder: Path) -> torch.dtype:
    """Return the least precise dtype among the tensors of a folder: the one that sets the tolerance."""
    found = {torch.float32}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as tensors:
            names = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
            found |= {kind for kind in TOLERANCES if SAFETENSORS_NAMES[kind] in names}
    return max(found, key=lambda kind: torch.finfo(kind).eps)


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
