"""Export: a run or a merged model as a folder for llama.cpp or Ollama; it appears whole and proven, or not."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lorasmith.errors import ExportError
from lorasmith.export.gguf import check_quant, read_llama_config, write_adapter, write_model
from lorasmith.export.llama_cpp import LEAST_AGREEING, NUM_QUESTIONS, GgufProof, prove, require_llama_cpp
from lorasmith.export.merge import merge
from lorasmith.export.ollama import make_modelfile
from lorasmith.export.proof import encode_questions
from lorasmith.export.questions import held_out_questions
from lorasmith.files import whole_folder
from lorasmith.model.found import FoundModel, Tell, find_model, say_nothing

EXPORTED_FILE = "lorasmith_export.json"  # in an exported folder: what it is, and that it may be replaced


@dataclass(frozen=True)
class Exported:
    """What was written: the .gguf file, its size in bytes, and the proof if one was asked for."""

    file: Path
    num_bytes: int
    proof: GgufProof | None
    notes: tuple[str, ...]


def export(
    run: str | Path,
    out_dir: str | Path,
    *,
    quant: str = "f16",
    adapter_only: bool = False,
    with_modelfile: bool = False,
    proves: bool = False,
    base: str | None = None,
    overwrite: bool = False,
    tell: Tell = say_nothing,
) -> Exported:
    """Write ``run`` (a run, an adapter or a merged folder) as GGUF into the new folder ``out_dir``.

    A run is merged first, with the merge's own proof; ``proves`` has llama.cpp answer as well.

    Raises:
        ExportError: the architecture, tokenizer or quantisation cannot be written, or the answers part.
        MergeError, RunError, AdapterError, BaseModelError: as :func:`lorasmith.merge`.
    """
    if not adapter_only:
        check_quant(quant)
    if adapter_only and (proves or with_modelfile):
        raise ExportError(
            "--adapter-only writes one file for a base of yours: leave out --prove and --to ollama."
        )
    if proves:
        require_llama_cpp()
    out = Path(out_dir).absolute()
    _check_place(out, overwrite)
    source = find_model(run, base=base, tell=tell)
    for note in source.notes:
        tell(note)
    read_llama_config(source.base.folder)
    name = Path(source.name).resolve().name
    if adapter_only:
        if source.adapter is None:
            raise ExportError(f"{run} has no adapter: it is a whole model. Leave out --adapter-only.")
        with whole_folder(out) as part:
            written = part / f"{name}-lora.gguf"
            write_adapter(source.base, source.adapter, written, name=name)
            _close(part, source, "adapter", None)
            return Exported(out / written.name, written.stat().st_size, None, ())
    with whole_folder(out) as part, tempfile.TemporaryDirectory(dir=part.parent, prefix=".merged.") as aside:
        record = source.record
        if source.adapter is not None:
            tell("Merging first, with proof ...")
            merged_folder = Path(aside) / "merged"
            merge(
                source.adapter, merged_folder, base=base, recipe=source.recipe, tell=tell, records_place=False
            )
            source = find_model(merged_folder)
        written = part / f"{name}-{quant}.gguf"
        tell(f"Writing {written.name} ...")
        write_model(source.base.folder, source.recipe, source.tokenizer, written, quant=quant, name=name)
        if with_modelfile:
            (part / "Modelfile").write_text(make_modelfile(source.recipe, f"./{written.name}"), "utf-8")
        proof = None
        if proves:
            tell("Asking transformers and llama.cpp ...")
            asked = encode_questions(
                held_out_questions(record, NUM_QUESTIONS), source.recipe, source.tokenizer
            )
            proof = prove(source.base, written, asked, source.recipe, source.tokenizer, quant)
            if not proof.is_faithful:
                raise ExportError(
                    f"llama.cpp answers {proof.num_same_answers} of {proof.num_questions} questions as the merged "
                    f"model does (at {quant} at least {LEAST_AGREEING[quant]:.0%} are needed), so the file was not "
                    "kept. Export with a finer --quant, or without --prove if you have judged the answers yourself."
                )
        _close(part, source, quant, proof)
        texts = [stop for stop in source.recipe.stop if stop not in source.recipe.special_tokens]
        notes = (
            (
                f"The answers also stop at the text {texts[0]!r}, which a .gguf file cannot hold: pass it as a stop.",
            )
            if texts and not with_modelfile
            else ()
        )
        return Exported(out / written.name, written.stat().st_size, proof, notes)


def _check_place(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise ExportError(f"{out} exists already. Choose another folder, or pass --overwrite to replace it.")
    if not (out / EXPORTED_FILE).is_file():
        raise ExportError(
            f"{out} was not written by an export (it has no {EXPORTED_FILE}): --overwrite does not replace it."
        )


def _close(part: Path, source: FoundModel, quant: str, proof: GgufProof | None) -> None:
    about = {"quant": quant, "base": source.base.ref.id, "proof": proof and proof.to_json()}
    (part / EXPORTED_FILE).write_text(json.dumps(about, indent=2) + "\n", "utf-8")
