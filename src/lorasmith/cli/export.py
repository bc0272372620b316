"""``lorasmith export``: a run or a merged model for llama.cpp and Ollama."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from lorasmith.cli.console import console


def command(
    run: Annotated[str, typer.Option(help="Run, adapter or merged folder.", show_default=False)],
    to: Annotated[
        Literal["gguf", "ollama"], typer.Option(help="ollama adds a Modelfile.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder of the export; made new.", show_default=False)],
    quant: Annotated[str, typer.Option(help="f32, f16, bf16, q8_0 or q4_0.")] = "f16",
    adapter_only: Annotated[
        bool,
        typer.Option("--adapter-only", help="Write the adapter alone, as a GGUF LoRA for the base's GGUF."),
    ] = False,
    prove: Annotated[
        bool,
        typer.Option("--prove", help="Ask llama.cpp too, and keep the file only if it answers alike."),
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="Where the unquantised base lies now, if it was moved.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Write a model for llama.cpp and Ollama: one .gguf file with tokenizer, chat template and stop tokens.

    Llama models only. A run is merged first, with proof.
    """
    from lorasmith.export.write import export

    done = export(
        run,
        out,
        quant=quant,
        adapter_only=adapter_only,
        with_modelfile=to == "ollama",
        proves=prove,
        base=base,
        overwrite=overwrite,
        tell=lambda line: console.print(f"[dim]{escape(line)}[/]", soft_wrap=True),
    )
    console.print(f"[bold]{escape(str(done.file))}[/] ({done.num_bytes / 1e6:,.1f} MB)", soft_wrap=True)
    for note in done.notes:
        console.print(f"[yellow]Note:[/] {escape(note)}", soft_wrap=True)
    if proof := done.proof:
        console.print(
            f"[green]llama.cpp agrees[/] with the merged model on {proof.num_same_answers} of {proof.num_questions} "
            f"greedy answers; perplexity {proof.perplexity_merged:.4f} merged, {proof.perplexity_gguf:.4f} "
            f"{proof.quant} ({proof.perplexity_gguf - proof.perplexity_merged:+.4f})",
            soft_wrap=True,
        )
    if adapter_only:
        console.print(
            f"Next: [bold]llama-cli -m BASE.gguf --lora {escape(str(done.file))}[/]", soft_wrap=True
        )
    elif to == "ollama":
        console.print(
            f"Next: [bold]cd {escape(str(out))} && ollama create {escape(out.name)} -f Modelfile[/]",
            soft_wrap=True,
        )
    else:
        console.print(f"Next: [bold]llama-cli -m {escape(str(done.file))} -cnv --temp 0[/]", soft_wrap=True)
