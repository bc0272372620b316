"""``lorasmith estimate``: will the run fit, how long will it take, how much disk; here, or on GPUs by name."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from lorasmith.cli.console import console, tell
from lorasmith.cli.run_file import RunFile, load_run_file, prepare
from lorasmith.files import nearest_existing

if TYPE_CHECKING:
    from lorasmith.training.estimate import Estimate

EXIT_DOES_NOT_FIT = 1


def command(
    arguments: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN.yaml [SECTION.KEY=VALUE]...",
            help="A run file, or settings alone (data.train=FILE), as for lorasmith train.",
        ),
    ],
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:N]",
            help="Compute it for this GPU, or for N of them, instead; may be given several times. "
            "No GPU and no weights are needed, only the model's config and tokenizer.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, for machines.")] = False,
) -> None:
    """Say whether a run fits into memory, how long it takes and what it writes.

    Here it is measured: two passes, forward and backward, over the largest pack of the data, of which nothing
    remains. For GPUs (--gpu) it is computed. The exit code is 1 where it does not fit.
    """
    words = list(arguments)
    path = words.pop(0) if "=" not in words[0] else None
    run_file = load_run_file(path, words)
    if gpu:
        estimates, disk = estimate_on_gpus(run_file, gpu)
    else:
        estimates, disk = _measure(run_file, quiet=as_json)
    free_disk = shutil.disk_usage(nearest_existing(Path(run_file.run.root))).free
    if as_json:
        report = {"estimates": [e.to_json() for e in estimates], "disk": disk, "free_disk_bytes": free_disk}
        print(json.dumps(report, indent=2))
    else:
        _print_estimates(estimates)
        _print_disk(disk, free_disk, Path(run_file.run.root))
    if any(estimate.fit is None for estimate in estimates):
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def _measure(run_file: RunFile, *, quiet: bool) -> tuple[list["Estimate"], dict[str, int]]:
    from lorasmith.model.base import say_nothing
    from lorasmith.model.memory import keep_freed_memory
    from lorasmith.training.estimate import disk_needed, estimate_here

    keep_freed_memory()  # as lorasmith train does
    with tempfile.TemporaryDirectory() as folder:
        job = prepare(
            run_file,
            Path(folder) / "estimate",
            say=say_nothing if quiet else tell,
            must_measure=True,
        )
    found = estimate_here(
        job.model, job.forward, job.dataset, job.training, run_file.objective, job.gain, job.fit
    )
    return [found], disk_needed(job.model, job.dataset, job.training, validates=job.validation is not None)


def estimate_on_gpus(run_file: RunFile, names: list[str]) -> tuple[list["Estimate"], dict[str, int]]:
    """Return what the run takes on each ``NAME[:N]``, computed without weights, and the disk that it needs."""
    from lorasmith.data.prompts import choose_recipe
    from lorasmith.data.tokens import num_rows
    from lorasmith.model.base import load_tokenizer, resolve_base
    from lorasmith.model.gpus import find_gpu
    from lorasmith.packing.plan import predict_gain
    from lorasmith.training.distributed import ALONE
    from lorasmith.training.estimate import disk_needed, estimate_on
    from lorasmith.training.job import check_settings
    from lorasmith.training.read_rows import read_rows
    from lorasmith.training.rehearsal import Rehearsal, build_without_weights
    from lorasmith.training.schedule import order_steps

    wanted = [find_gpu(name) for name in names]
    trusts, quantization = run_file.base.trust_remote_code, run_file.base.quantization
    check_settings(run_file)
    base = resolve_base(run_file.base, fetches_weights=False)
    tokenizer = load_tokenizer(base, trust_remote_code=trusts)
    recipe, _ = choose_recipe(run_file.prompt, tokenizer, run_file.objective.kind)
    training = run_file.training
    rows = read_rows(
        run_file.data,
        training,
        run_file.objective.kind,
        recipe,
        tokenizer,
        say=lambda line: None,
        progress=lambda what, share: None,
        team=ALONE,
    )
    dataset = rows.dataset
    gain = predict_gain(dataset, training.batch_size, order=order_steps(dataset, training).examples_of)
    rehearsals: dict[str, Rehearsal] = {}
    estimates = []
    for gpu, count in wanted:
        dtype = gpu.best_dtype if run_file.base.dtype == "auto" else run_file.base.dtype
        if dtype not in rehearsals:
            sketch = build_without_weights(
                base.folder,
                run_file.method,
                dtype,
                seed=training.seed,
                num_steps=training.num_steps(num_rows(dataset)),
                trust_remote_code=trusts,
                quantization=quantization,
            )
            rehearsals[dtype] = Rehearsal(sketch, run_file.engine, quantization)
        estimates.append(
            estimate_on(
                gpu,
                count,
                rehearsals[dtype],
                dataset,
                training,
                run_file.objective,
                gain,
                run_file.engine,
                dtype,
            )
        )
    disk = disk_needed(rehearsals[dtype].model, dataset, training, validates=rows.validation is not None)
    return estimates, disk


def _print_estimates(estimates: list["Estimate"]) -> None:
    from lorasmith.model.memory import in_gib
    from lorasmith.training.estimate import SECONDS_TO_START_AN_OPERATION

    first = estimates[0]
    table = Table("", *(estimate.place for estimate in estimates), box=None, pad_edge=False)
    for what in first.parts:
        table.add_row(what, *(in_gib(estimate.parts[what]) for estimate in estimates))
    table.add_row("[bold]at the peak[/]", *(f"[bold]{in_gib(e.peak_bytes)}[/]" for e in estimates))
    table.add_row("memory there", *(in_gib(estimate.memory_bytes) for estimate in estimates))
    table.add_row("fits", *("[green]yes[/]" if e.fit else "[red]no[/]" for e in estimates))
    table.add_row("tokens in a pack", *(f"{e.fit.micro_batch_tokens:,}" if e.fit else "-" for e in estimates))
    table.add_row(
        "activations",
        *(("recomputed" if e.fit.gradient_checkpointing else "kept") if e.fit else "-" for e in estimates),
    )
    table.add_row("a step", *(_span(e, 1 / e.num_steps) for e in estimates))
    table.add_row(f"all {first.num_steps:,} steps", *(_span(e, 1.0) for e in estimates))
    console.print(table)
    if small := [estimate.place for estimate in estimates if estimate.is_bound_by_starts]:
        console.print(
            f"On {', '.join(small)} the operations of a step are so small that starting them takes longer than "
            f"computing them: {SECONDS_TO_START_AN_OPERATION * 1e6:.0f} µs each, on any GPU alike. A faster one would "
            "be no faster here."
        )
    asked = (
        f"; {first.num_asked:,} more go through without gradient, each taken as half as dear"
        if first.num_asked
        else ""
    )
    once = ", shared prefixes counted once" if first.shares_prefixes else ""
    console.print(f"Tokens of the run: {first.num_tokens:,}{once}{asked}. {_basis(first)}")


def _basis(estimate: "Estimate") -> str:
    if estimate.fit is not None and estimate.fit.seconds_per_token:
        return f"Peak and time: {estimate.how}. Validation and saving come on top."
    traffic = "the traffic of the sharded base, " if estimate.is_sharded else ""
    return (
        "All of it is computed, not measured: memory by a rehearsal without weights, plus 15% for the allocator and "
        "0.8 GiB for CUDA; time at 25% to 50% of the GPU's peak rate, and 8 µs for each operation at least, without "
        f"{traffic}validation and saving."
    )


def _span(estimate: "Estimate", share: float) -> str:
    from lorasmith.training.estimate import in_words

    if estimate.seconds is None:
        return "-"
    least, most = (seconds * share for seconds in estimate.seconds)
    if most < 90:
        return f"{least:.2g} s" if least == most else f"{least:.2g} to {most:.2g} s"
    return in_words(least) if least == most else f"{in_words(least)} to {in_words(most)}"


def _print_disk(disk: dict[str, int], free: int, root: Path) -> None:
    total = sum(disk.values())
    parts = ", ".join(f"{what} {num_bytes / 2**20:,.0f} MiB" for what, num_bytes in disk.items())
    console.print(
        f"Disk: {total / 2**20:,.0f} MiB ({parts}); {free / 2**20:,.0f} MiB are free in {escape(str(root))}."
    )
    if total > free:
        console.print("[yellow]Warning:[/] that is more than is free. Name another folder with run.root=DIR.")
