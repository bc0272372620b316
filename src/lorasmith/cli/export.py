"""``lorasmith export``: a run or a merged model for llama.cpp and Ollama."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from lorasmith.cli.console import console, tell
from lorasmith.errors import SettingsError

if TYPE_CHECKING:
    from lorasmith.export.write import Exported


def command(
    run: Annotated[str, typer.Option(help="Run, adapter or merged folder.", show_default=False)],
    to: Annotated[
        Literal["gguf", "ollama"], typer.Option(help="ollama adds a Modelfile.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder of the export; made new.", show_default=False)],
    quant: Annotated[
        list[str] | None,
        typer.Option(
            help="f16 (unless told otherwise), f32, bf16, q8_0, q4_0 or q4_k_m. Given again: a file of each."
        ),
    ] = None,
    adapter_only: Annotated[
        bool,
        typer.Option("--adapter-only", help="Write the adapter alone, as a GGUF LoRA for the base's GGUF."),
    ] = False,
    prove: Annotated[
        bool,
        typer.Option("--prove", help="Ask llama.cpp too, and keep the file only if it answers alike."),
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Questions for the proofs: .txt with one a line, or a data file. Else the run's own."
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Where the unquantised base lies now, if it was moved.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Write a model for llama.cpp and Ollama: one .gguf file with tokenizer, chat template and stop tokens.

    Llama models only. A run is merged first, with proof.
    """
    if adapter_only and quant:
        raise SettingsError(
            "--adapter-only writes the adapter in float32, whatever the base's GGUF is quantised to: leave out --quant."
        )
    from lorasmith.export.questions import read_questions
    from lorasmith.export.write import export

    done = export(
        run,
        out,
        quants=quant or ["f16"],
        adapter_only=adapter_only,
        with_modelfile=to == "ollama",
        proves=prove,
        prompts=None if prompts is None else read_questions(prompts),
        base=base,
        overwrite=overwrite,
        tell=tell,
    )
    for one in done.files:
        size = f"{one.num_bytes / 1e6:,.1f} MB, written in {one.write_seconds:.1f} s"
        console.print(f"[bold]{escape(str(out / one.file.name))}[/] ({size})", soft_wrap=True)
    if prove:
        _print_proofs(done)
    for note in done.notes:
        console.print(f"[yellow]Note:[/] {escape(note)}", soft_wrap=True)
    if adapter_only:
        console.print(
            f"Next: [bold]llama-cli -m BASE.gguf --lora {escape(str(out / done.files[0].file.name))}[/]",
            soft_wrap=True,
        )
    elif to == "ollama":
        console.print(
            f"Next: [bold]cd {escape(str(out))} && ollama create {escape(out.name)} -f Modelfile[/]",
            soft_wrap=True,
        )
    else:
        console.print(
            f"Next: [bold]llama-cli -m {escape(str(out / done.files[0].file.name))} -cnv --temp 0[/]",
            soft_wrap=True,
        )


def _print_proofs(done: "Exported") -> None:
    """Print how each file answers beside the tuned model, in a table of one row a file."""
    proofs = [one.proof for one in done.files if one.proof]
    count = proofs[0].num_questions
    console.print(
        f"The tuned model's greedy answers to {count} questions, in float32, and those from each file:",
        soft_wrap=True,
    )
    table = Table(
        "", "same in llama.cpp", "in transformers", "perplexity", "change", "logits move by", box=None
    )
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("tuned", "", "", f"{proofs[0].perplexity_merged:.4f}", "", "")
    for proof in proofs:
        read = ["-"] * 4  # transformers reads no adapter alone
        if proof.perplexity_gguf is not None:
            change = proof.perplexity_gguf / proof.perplexity_merged - 1
            read = [
                f"{proof.num_same_in_transformers} of {count}",
                f"{proof.perplexity_gguf:.4f}",
                f"{change:+.2%}",
                f"{proof.max_logit_difference:.2g}",
            ]
        table.add_row(proof.quant, f"{proof.num_same_answers} of {count}", *read)
    console.print(table)
    for proof in proofs:
        if proof.margins:
            said = ", ".join(f"{margin:.2g}" for margin in sorted(proof.margins))
            console.print(
                f"{proof.quant}: where llama.cpp parts, the tuned model preferred its own token by {said} (logits).",
                soft_wrap=True,
            )
