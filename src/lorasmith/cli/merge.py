"""``lorasmith merge``: a run becomes a model that stands alone, with the proof that it answers the same."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from lorasmith.cli.console import console, tell
from lorasmith.errors import SettingsError

if TYPE_CHECKING:
    from lorasmith.export.proof import MergeProof

DTYPES = ("auto", "float32", "bfloat16", "float16")


def command(
    run: Annotated[
        Path, typer.Option(help="Run folder, or a plain PEFT adapter folder.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder of the merged model; made new.", show_default=False)],
    dtype: Annotated[
        str, typer.Option(help="Number format of the merged weights; auto: as in the base.")
    ] = "auto",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Questions for the proof: .txt with one a line, or a data file. Else the run's own."
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Where the unquantised base lies now, if it was moved.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where the two models are compared: auto, cpu, cuda, mps.")
    ] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a model that was merged before.")
    ] = False,
) -> None:
    """Fold an adapter into its base, and prove that the answers stay the same.

    The merged folder opens with plain transformers, vLLM and others.
    If its logits part from base + adapter by more than rounding,
    it is refused and nothing is left behind.
    """
    if dtype not in DTYPES:
        raise SettingsError(f"--dtype is {dtype}; it can be {', '.join(DTYPES)}.")
    from lorasmith.export.merge import merge
    from lorasmith.export.questions import read_questions

    proof = merge(
        run,
        out,
        base=base,
        dtype=dtype,  # type: ignore[arg-type]
        prompts=None if prompts is None else read_questions(prompts),
        device=device,
        overwrite=overwrite,
        tell=tell,
    )
    print_proof(proof)
    console.print(f"Merged model: [bold]{escape(str(out))}[/] (proof: merge_proof.json)", soft_wrap=True)
    console.print(f'Next: [bold]lorasmith ask "your question" --run {escape(str(out))}[/]', soft_wrap=True)


def print_proof(proof: "MergeProof") -> None:
    """Print what was compared, and what a faithful merge may show."""
    limit = proof.tolerance
    table = Table(
        "base + adapter against merged", "measured", f"limit ({proof.dtype})", box=None, pad_edge=False
    )
    table.add_row("largest logit difference", f"{proof.max_logit_difference:.2g}", "", style="bold")
    table.add_row("  as a share of the logits' range", f"{proof.of_range:.2g}", f"{limit.of_range:g}")
    table.add_row("  as a share of the adapter's effect", f"{proof.of_effect:.2g}", f"{limit.of_effect:g}")
    table.add_row(
        "same greedy answers",
        f"{proof.num_same_answers} of {proof.num_questions}",
        f"{limit.agreeing:.0%}",
        style="bold",
    )
    table.add_row("logits compared at", f"{proof.num_positions:,} tokens", "")
    console.print(table)
    if proof.num_same_prompts < proof.num_questions:
        console.print(
            f"[yellow]Note:[/] the tokenizer's chat template alone gives the trained prompt for "
            f"{proof.num_same_prompts} of {proof.num_questions} questions. Ask through lorasmith, which reads the "
            "recipe in lorasmith.json."
        )
    console.print(
        f"[green]Proven equal[/] in {proof.proof_seconds:.1f} s; folded in {proof.fold_seconds:.1f} s ({proof.way}). "
        + ("" if proof.update_norm is None else f"Norm of the update: {proof.update_norm:.3g}")
    )
