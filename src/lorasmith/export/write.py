"""Export: a run or a merged model as a folder for llama.cpp or Ollama; it appears whole and proven, or not."""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lorasmith.data.example import Message
from lorasmith.errors import ExportError
from lorasmith.export.gguf import added_bos, read_llama_config, write_adapter, write_model
from lorasmith.export.gguf_proof import NUM_QUESTIONS, GgufProof, expect, prove, prove_adapter
from lorasmith.export.llama_cpp import require_llama_cpp
from lorasmith.export.merge import merge
from lorasmith.export.ollama import make_modelfile
from lorasmith.export.proof import encode_questions
from lorasmith.export.quantise import check_quant
from lorasmith.export.questions import held_out_questions, spread_evenly
from lorasmith.files import whole_folder
from lorasmith.model.found import FoundModel, Tell, find_model, say_nothing

EXPORTED_FILE = "lorasmith_export.json"  # in an exported folder: what it is, and that it may be replaced


@dataclass(frozen=True)
class ExportedFile:
    """One .gguf file, and the proof if one was asked for. ``quant`` of an adapter's is "adapter"."""

    file: Path
    quant: str
    num_bytes: int
    write_seconds: float
    proof: GgufProof | None = None
    proof_seconds: float = 0.0


@dataclass(frozen=True)
class Exported:
    """What was written, and what a user should know about it."""

    files: tuple[ExportedFile, ...]
    notes: tuple[str, ...] = ()


def export(
    run: str | Path,
    out_dir: str | Path,
    *,
    quants: Sequence[str] = ("f16",),
    adapter_only: bool = False,
    with_modelfile: bool = False,
    proves: bool = False,
    prompts: Sequence[Sequence[Message]] | None = None,
    base: str | None = None,
    overwrite: bool = False,
    tell: Tell = say_nothing,
) -> Exported:
    """Write ``run`` (a run, an adapter or a merged folder) as GGUF into the new folder ``out_dir``.

    A run is merged first, with the merge's own proof; ``proves`` has llama.cpp and transformers answer from each
    file as well. The proofs ask 20 of ``prompts``, else the run's own questions.

    Raises:
        ExportError: the architecture, tokenizer or quantisation cannot be written, or the answers part.
        MergeError, RunError, AdapterError, BaseModelError: as :func:`lorasmith.merge`.
    """
    for quant in () if adapter_only else quants:
        check_quant(quant)
    if with_modelfile and (adapter_only or len(quants) != 1):
        what = "--adapter-only" if adapter_only else "several --quant"
        raise ExportError(f"A Modelfile is for one whole model: leave out {what} or --to ollama.")
    if proves:
        require_llama_cpp("--prove")
    out = Path(out_dir).absolute()
    _check_place(out, overwrite)
    source = find_model(run, base=base, tell=tell)
    for note in source.notes:
        tell(note)
    read_llama_config(source.base.folder)
    name = Path(source.name).resolve().name
    questions = (
        held_out_questions(source.record, NUM_QUESTIONS)
        if prompts is None
        else spread_evenly(prompts, NUM_QUESTIONS)
    )
    asked = encode_questions(questions, source.recipe, source.tokenizer) if proves else ()
    with whole_folder(out) as part, tempfile.TemporaryDirectory(dir=part.parent, prefix=".export.") as aside:
        if adapter_only:
            done = Exported((_export_adapter(source, part, name, asked, Path(aside), tell),))
        else:
            if source.adapter is not None:
                tell("Merging first, with proof ...")
                merge(
                    source.adapter,
                    Path(aside) / "merged",
                    base=base,
                    recipe=source.recipe,
                    prompts=None if prompts is None else questions,
                    tell=tell,
                    records_place=False,
                )
                source = find_model(Path(aside) / "merged")
            done = Exported(_export_models(source, part, name, quants, asked, tell), _notes(source))
        if with_modelfile:
            bos = added_bos(source.tokenizer, source.recipe)
            text = make_modelfile(source.recipe, f"./{done.files[0].file.name}", added_bos=bos)
            (part / "Modelfile").write_text(text, "utf-8")
            done = Exported(done.files)  # the Modelfile says the stop texts
        _close(part, source, done)
    return Exported(tuple(replace(one, file=out / one.file.name) for one in done.files), done.notes)


def _export_models(
    merged: FoundModel,
    folder: Path,
    name: str,
    quants: Sequence[str],
    asked: Sequence[Sequence[int]],
    tell: Tell,
) -> tuple[ExportedFile, ...]:
    done = []
    for quant in quants:
        file = folder / f"{name}-{quant}.gguf"
        tell(f"Writing {file.name} ...")
        started = time.monotonic()
        write_model(merged.base.folder, merged.recipe, merged.tokenizer, file, quant=quant, name=name)
        done.append(ExportedFile(file, quant, file.stat().st_size, time.monotonic() - started))
    if not asked:
        return tuple(done)
    tell(f"Asking the merged model {len(asked)} questions ...")
    expected = expect(merged, asked)
    proven = []
    for one in done:
        tell(f"Asking llama.cpp and transformers with {one.file.name} ...")
        started = time.monotonic()
        proof = prove(expected, one.file, one.quant)
        proof.check()
        proven.append(replace(one, proof=proof, proof_seconds=time.monotonic() - started))
    return tuple(proven)


def _export_adapter(
    source: FoundModel, folder: Path, name: str, asked: Sequence[Sequence[int]], aside: Path, tell: Tell
) -> ExportedFile:
    """Write the adapter alone; its proof asks llama.cpp with it over the base, written in float32 for that."""
    if source.adapter is None:
        raise ExportError(f"{source.name} has no adapter: it is a whole model. Leave out --adapter-only.")
    file = folder / f"{name}-lora.gguf"
    started = time.monotonic()
    write_adapter(source.base, source.adapter, file, name=name)
    done = ExportedFile(file, "adapter", file.stat().st_size, time.monotonic() - started)
    if not asked:
        return done
    tell(f"Asking base and adapter {len(asked)} questions, in transformers, then in llama.cpp ...")
    started = time.monotonic()
    base_file = aside / "base.gguf"
    write_model(source.base.folder, source.recipe, source.tokenizer, base_file, quant="f32", name="base")
    proof = prove_adapter(expect(source, asked), base_file, file)
    proof.check()
    return replace(done, proof=proof, proof_seconds=time.monotonic() - started)


def _notes(source: FoundModel) -> tuple[str, ...]:
    texts = [stop for stop in source.recipe.stop if stop not in source.recipe.special_tokens]
    if not texts:
        return ()
    return (
        f"The answers also stop at the text {texts[0]!r}, which a .gguf file cannot hold: pass it as a stop.",
    )


def _check_place(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise ExportError(f"{out} exists already. Choose another folder, or pass --overwrite to replace it.")
    if not (out / EXPORTED_FILE).is_file():
        raise ExportError(
            f"{out} was not written by an export (it has no {EXPORTED_FILE}): --overwrite does not replace it."
        )


def _close(part: Path, source: FoundModel, done: Exported) -> None:
    files = [
        {"file": one.file.name, "quant": one.quant, "proof": one.proof and one.proof.to_json()}
        for one in done.files
    ]
    about = {"base": source.base.ref.id, "files": files}
    (part / EXPORTED_FILE).write_text(json.dumps(about, indent=2) + "\n", "utf-8")
