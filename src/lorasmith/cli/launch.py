"""``lorasmith launch``: the same run on a rented machine; what it costs is said before anything is rented."""

import getpass
import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.markup import escape
from rich.table import Table

from lorasmith.cli.console import console, tell
from lorasmith.cli.estimate import estimate_on_gpus
from lorasmith.cli.options import refuse_ignored
from lorasmith.cli.report import check_held_out
from lorasmith.cli.run_file import RunFile, load_run_file
from lorasmith.cli.train import choose_run_dir
from lorasmith.cloud import launch as sky
from lorasmith.cloud.fetch import fetch
from lorasmith.cloud.quote import (
    SECONDS_AROUND,
    Quote,
    budget_seconds,
    cheapest,
    name_in_catalog,
    name_in_table,
)
from lorasmith.cloud.records import LaunchRecord, find_record, read_records, remove_record, write_record
from lorasmith.cloud.task import Bucket, Launch, make_task
from lorasmith.cloud.workdir import fill_workdir
from lorasmith.errors import CloudError, RunError, SettingsError
from lorasmith.model.gpus import find_gpu
from lorasmith.model.settings import BUILT_IN
from lorasmith.serve.keys import KEYS_VARIABLE, read_keys

_ACTIONS = ("status", "logs", "down", "fetch")
_TRIED_GPUS = ("T4", "L4", "A10G", "L40S", "A100", "A100-80GB", "H100")  # where --gpu names none
_SCHEME_OF_CLOUD = {"aws": "s3", "gcp": "gs"}


def command(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN.yaml [SECTION.KEY=VALUE]... | status | logs [NAME] | down [NAME] | fetch [NAME]",
            help="A run file and settings, as for lorasmith train; or what to do about a launch.",
        ),
    ] = None,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:N]",
            help="GPUs of one machine, such as L4:1; may be given several times, the cheapest is taken. "
            f"Default: one of {', '.join(_TRIED_GPUS)}, whichever does the run for the least money.",
        ),
    ] = None,
    cloud: Annotated[
        list[str] | None,
        typer.Option(help="Rent only there: aws, gcp, lambda, kubernetes ...; may be given several times."),
    ] = None,
    spot: Annotated[
        bool,
        typer.Option("--spot", help="Rent spot machines: cheaper; when one is taken away, another goes on."),
    ] = False,
    nodes: Annotated[int, typer.Option(min=1, help="Machines, joined by torchrun.")] = 1,
    max_cost: Annotated[
        float | None,
        typer.Option(
            metavar="DOLLARS", min=0.01, help="End the run, saved, when this much rent has been used."
        ),
    ] = None,
    bucket: Annotated[
        str | None,
        typer.Option(
            metavar="s3://NAME|gs://NAME",
            help="Where the run is kept. Default: one of yours in the rented cloud.",
        ),
    ] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(
            metavar="VARIABLE",
            help="Environment variable that the run needs there; HF_TOKEN goes along by itself.",
        ),
    ] = None,
    serve: Annotated[
        bool,
        typer.Option(
            "--serve", help="Serve the result on that machine afterwards, until --max-cost is used."
        ),
    ] = False,
    port: Annotated[
        int | None, typer.Option(help="Port of --serve, 8000 where none is named.", show_default=False)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Launch a run again; it goes on from its copy in the bucket.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the quote and the task; rent nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before money is spent.")] = False,
    install: Annotated[
        bool, typer.Option("--install", help="Put SkyPilot into an environment of its own, and end.")
    ] = False,
    root: Annotated[
        Path | None, typer.Option(help="Folder of runs, for status, logs, down and fetch. Default: runs.")
    ] = None,
) -> None:
    """Train on a rented machine by SkyPilot: a quote first, then the job; fetch brings the run home.

    status lists what was launched from here, logs shows what the machine says, down ends the rent.
    """
    words = list(arguments or ())
    for_a_launch: dict[str, Any] = {
        "gpu": gpu,
        "cloud": cloud,
        "spot": spot,
        "nodes": nodes > 1,
        "max_cost": max_cost,
        "bucket": bucket,
        "secret": secret,
        "serve": serve,
        "port": port,
        "resume": resume,
        "dry_run": dry_run,
    }
    if install:
        refuse_ignored("--install", **for_a_launch, root=root)
        if words:
            raise SettingsError(
                f"--install launches nothing. Leave {words[0]} out, and launch it afterwards."
            )
        folder = sky.install(tell)
        console.print(
            f"SkyPilot is installed. Next, your cloud's credentials: [bold]{folder}/bin/sky check[/]"
        )
        return
    if words and words[0] in _ACTIONS:
        refuse_ignored(f"launch {words[0]}", **for_a_launch)
        _act(words[0], words[1:], root or Path("runs"))
        return
    if not words:
        raise SettingsError("Nothing to launch: name a run file. What there is to do about a launch: --help")
    if root is not None:
        raise SettingsError(
            f"--root is for status, logs, down and fetch. A launch is noted beside its run: run.root={root}"
        )
    path = words.pop(0) if "=" not in words[0] else None
    run_file = load_run_file(path, words)
    if serve:
        _check_serve(nodes, spot, max_cost)
    elif port is not None:
        raise SettingsError(f"--port {port} is the port of --serve. Add --serve, or leave --port out.")
    check_held_out(run_file.report, run_file.objective.kind)  # there it would end a rented machine's work
    runs, name = Path(run_file.run.root), choose_run_dir(run_file).name
    records = read_records(runs)
    earlier = next((record for record in records if record.name == name), None)
    bucket = _settle_bucket(bucket, earlier if resume else None)
    quotes = _quote(run_file, gpu, cloud, nodes, spot, serve)
    launch = Launch(
        name=name,
        bucket=Bucket.parse(bucket or _default_bucket(quotes[0])),
        nodes=nodes,
        needs_built_in=run_file.base.model == BUILT_IN,
        secrets=_secrets(secret or [], serve),
        serve_port=(8000 if port is None else port) if serve else None,
        budget_seconds=None if max_cost is None else _budget(max_cost, quotes),
    )
    if not dry_run:
        _check_new(launch, records, earlier, resume)
    with tempfile.TemporaryDirectory(prefix="lorasmith-launch-") as folder:
        fill_workdir(
            Path(folder), run_file.model_dump(mode="json", exclude_defaults=True), _extras(run_file, serve)
        )
        task = make_task(launch, quotes, folder)
        _print_plan(launch, Path(folder), max_cost)
        if dry_run:
            _print_task(task)
            return
        if not yes:
            _confirm(quotes[0])
        _start(launch, task, runs, _uploaded_base(run_file, launch), earlier)


def _settle_bucket(named: str | None, earlier: LaunchRecord | None) -> str | None:
    """Return the bucket as named, or that of the ``earlier`` launch that is gone on with; None: neither.

    A run that goes on does so from its own bucket: the cheapest cloud of today may be another one.
    """
    if earlier is None:
        return named
    if named is not None and Bucket.parse(named).url != earlier.bucket:
        raise SettingsError(
            f"--bucket {named}: {earlier.name} is kept in {earlier.bucket}, and --resume goes on from there. Leave "
            "--bucket out; or launch it anew in another bucket under another name: run.name=NAME without --resume."
        )
    return earlier.bucket


def _uploaded_base(run_file: RunFile, launch: Launch) -> str | None:
    """Return the folder or file of here that travels as the base; None: the machine gets it from elsewhere."""
    base = Path(run_file.base.model).expanduser()
    return str(base.resolve()) if base.exists() and not launch.needs_built_in else None


def _quote(
    run_file: RunFile,
    gpu: list[str] | None,
    clouds: list[str] | None,
    nodes: int,
    spot: bool,
    serve: bool,
) -> list[Quote]:
    """Print and return the cheapest offers for the run."""
    machines: dict[str, str] = {}  # as SkyPilot names it -> as model/gpus.py names the GPUs of all nodes
    for words in gpu or _TRIED_GPUS:
        kind, count = find_gpu(name_in_table(words))
        machines[f"{name_in_catalog(kind.name)}:{count}"] = f"{kind.name}:{count * nodes}"
    wanted = _choose_clouds(clouds, sky.list_clouds(serves=serve, nodes=nodes))
    estimates, _ = estimate_on_gpus(run_file, list(machines.values()))
    seconds = {
        machine: estimate.seconds
        for machine, estimate in zip(machines, estimates, strict=True)
        if estimate.seconds is not None
    }
    if not seconds:
        most = max(estimate.memory_bytes for estimate in estimates) / 2**30
        least = min(estimate.peak_bytes for estimate in estimates) / 2**30
        raise SettingsError(
            f"The run fits none of {', '.join(machines)}: it takes {least:.1f} GiB and the largest has {most:.1f}. "
            "See what takes it: lorasmith estimate RUN.yaml --gpu NAME"
        )
    if whole := _what_loads_whole(run_file, serve):
        too_small = [
            machine
            for machine, estimate in zip(machines, estimates, strict=True)
            if machine in seconds and not estimate.takes_whole
        ]
        seconds = {machine: span for machine, span in seconds.items() if machine not in too_small}
        if too_small:
            said = f"With its base sharded the run fits {', '.join(too_small)}, but {whole}"
            if not seconds:
                raise SettingsError(said)
            console.print(f"Left out: {said}")
    quotes = cheapest(sky.find_offers(list(seconds), wanted, spot=spot), seconds, nodes)
    if not quotes:
        raise SettingsError(
            f"{', '.join(wanted)} {'have' if len(wanted) > 1 else 'has'} no {'spot ' if spot else ''}machine with "
            f"{' or '.join(seconds)} in SkyPilot's catalog. Try another --gpu, or without --spot or --cloud."
        )
    _print_quotes(quotes, serve)
    if any(estimate.is_sharded for estimate in estimates):
        console.print(
            "The base is sharded, and the times are without the traffic of its layers, which can take longer than "
            "the computing (docs/scale.md)."
        )
    return quotes


def _what_loads_whole(run_file: RunFile, serve: bool) -> str:
    """Return what the launch does after training with the base whole on one GPU, and the way out; may be empty."""
    if serve:
        return "--serve loads the base whole on one GPU, which it does not fit. Leave --serve out."
    if run_file.report.after_training:
        return (
            "the report after training loads the base whole on one GPU, which it does not fit. Leave the report out: "
            "report.after_training=false; lorasmith report makes it later, where the base fits."
        )
    return ""


def _choose_clouds(named: list[str] | None, reachable: dict[str, str]) -> list[str]:
    """Return the clouds to rent in, of those that were named or all; what lacks something is told or refused."""
    wanted = [name.lower() for name in named or reachable]
    if missing := [name for name in wanted if name not in reachable]:
        raise SettingsError(
            f"--cloud {missing[0]}: SkyPilot has credentials for {', '.join(reachable)}. What is missing: "
            f"{sky.find_sky()} check {missing[0]}"
        )
    able = [name for name in wanted if not reachable[name]]
    unable = "; ".join(f"{name} (no {reachable[name]})" for name in wanted if reachable[name])
    if not able:
        raise SettingsError(f"SkyPilot cannot do what this launch needs in {unable}. Name another --cloud.")
    if unable:
        console.print(f"Left out, since SkyPilot cannot do there what this launch needs: {unable}.")
    return able


def _print_quotes(quotes: Sequence[Quote], serve: bool) -> None:
    from lorasmith.training.estimate import in_words

    table = Table("machine", "where", box=None, pad_edge=False)
    for name in ("an hour", "training", "in all"):
        table.add_column(name, justify="right")
    for quote in quotes:
        count = f"{quote.nodes} x " if quote.nodes > 1 else ""
        table.add_row(
            f"[bold]{count}{quote.offer.machine}[/]{' spot' if quote.offer.spot else ''}",
            escape(quote.offer.infra),
            f"${quote.hourly:.2f}",
            " to ".join(dict.fromkeys(in_words(seconds) for seconds in quote.seconds)),
            "[bold]" + " to ".join(dict.fromkeys(f"${cost:.2f}" for cost in quote.cost)) + "[/]",
        )
    console.print(table)
    if any(least == most for least, most in (quote.seconds for quote in quotes)):
        console.print(
            "One time where others have two: the operations of a step are so small that starting them takes the time, "
            "on any GPU alike."
        )
    others = (
        "and the serving, which takes the rest of --max-cost."
        if serve
        else "machines that are replaced, and the small CPU machine on which SkyPilot watches the job."
    )
    console.print(
        "Prices: SkyPilot's catalog. Times: computed, not measured (lorasmith estimate), and "
        f"{SECONDS_AROUND // 60} minutes for booting, installing and clearing up. Not in it: the bucket, traffic, "
        f"the report after training, {others}"
    )


def _budget(max_cost: float, quotes: Sequence[Quote]) -> float:
    seconds = budget_seconds(max_cost, quotes)
    if seconds is None:
        raise SettingsError(
            "--max-cost: these machines cost nothing in SkyPilot's catalog, so nothing can be counted."
        )
    if seconds < 1.5 * SECONDS_AROUND:
        raise SettingsError(
            f"--max-cost {max_cost:g} rents the dearest of these machines for {seconds / 60:.0f} minutes, of which "
            f"booting and installing take about {SECONDS_AROUND // 60}. Allow more."
        )
    least = min(quote.cost[0] for quote in quotes)
    if max_cost < least:
        console.print(
            f"[yellow]Warning:[/] --max-cost {max_cost:g} is less than the ${least:.2f} that the run takes at the "
            "least. It will be stopped on the way; --resume goes on."
        )
    return seconds


def _check_serve(nodes: int, spot: bool, max_cost: float | None) -> None:
    if nodes > 1 or spot:
        raise SettingsError(
            "--serve keeps one machine: a spot machine would be taken away from those who ask, and nothing watches "
            "it. Leave --spot and --nodes out."
        )
    if max_cost is None:
        raise SettingsError(
            "--serve does not end by itself. Say how much rent it may use: --max-cost DOLLARS"
        )
    if not read_keys(None):
        raise SettingsError(
            f"--serve opens a port to everybody. Put keys into {KEYS_VARIABLE}, separated by commas; they travel as a "
            "secret."
        )


def _secrets(named: Sequence[str], serve: bool) -> tuple[str, ...]:
    if missing := [name for name in named if name not in os.environ]:
        raise SettingsError(f"--secret {missing[0]}: there is no environment variable of that name.")
    found = ["HF_TOKEN"] if "HF_TOKEN" in os.environ else []
    return tuple(dict.fromkeys([*found, *([KEYS_VARIABLE] if serve else []), *named]))


def _extras(run_file: RunFile, serve: bool) -> list[str]:
    """Return the extras of lorasmith that the run needs there."""
    sources = [run_file.data.train, run_file.data.validation, *run_file.report.data]
    sources = [Path(path).expanduser() for path in sources if path is not None]
    found = [*run_file.run.trackers, *(["serve"] if serve else [])]
    if run_file.base.quantization != "none":
        found.append("quantized")
    if any(not source.exists() for source in sources):
        found.append("hub-data")
    if any(path.suffix.lower() == ".parquet" for source in sources for path in (source, *source.rglob("*"))):
        found.append("parquet")
    return found


def _default_bucket(quote: Quote) -> str:
    scheme = _SCHEME_OF_CLOUD.get(quote.offer.cloud)
    if scheme is None:
        raise SettingsError(
            f"{quote.offer.cloud} has no bucket of its own for the run's checkpoints. Name one that you have access "
            "to: --bucket s3://NAME or gs://NAME"
        )
    owner = f"{getpass.getuser()}@{platform.node()}"  # names of buckets are shared by the whole world
    return f"{scheme}://lorasmith-{hashlib.sha256(owner.encode()).hexdigest()[:16]}"


def _check_new(
    launch: Launch, records: Sequence[LaunchRecord], earlier: LaunchRecord | None, resume: bool
) -> None:
    name = launch.name
    for record in records:
        if record.job == launch.job and record.name != name:
            raise RunError(
                f"{record.name}, which was launched from here, and {name} are both {launch.job} to SkyPilot, which "
                "knows only small letters, digits and -. Choose another name: run.name=NAME."
            )
    if earlier is not None and not resume:
        raise RunError(
            f"{name} was launched from here before. See how it is: lorasmith launch status. To go on from its copy in "
            "the bucket: --resume. For another run, choose another name: run.name=NAME."
        )
    if resume and earlier is None:
        raise RunError(f"Nothing called {name} was launched from here, so there is nothing to go on with.")


def _print_plan(launch: Launch, folder: Path, max_cost: float | None) -> None:
    """Say what is uploaded, where the run is kept, and when --max-cost ends it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files)
    console.print(
        f"Upload: {len(files):,} files, {size / 2**20:.1f} MiB. Bucket: {launch.bucket.url}/{launch.name}"
    )
    if max_cost is not None and launch.budget_seconds is not None:
        ends = (
            "The machine itself ends the run then, saved; --resume has a --max-cost of its own."
            if launch.serve_port is None
            else f"It serves until then; lorasmith launch down {escape(launch.name)} ends it earlier."
        )
        console.print(
            f"--max-cost ${max_cost:g}: at the dearest of these prices {launch.budget_seconds / 3600:.1f} hours of "
            f"rent, of all machines that this launch gets. {ends}"
        )


def _print_task(task: dict[str, Any]) -> None:
    """Print SkyPilot's plan for the task, and the task."""
    print(sky.check_task(task), end="\n\n")
    console.print("Nothing was rented. The task:")
    print(yaml.dump(task, Dumper=_Readable, sort_keys=False, width=120), end="")


def _confirm(quote: Quote) -> None:
    if not sys.stdin.isatty():
        raise SettingsError("Nobody can be asked whether to spend this: there is no terminal. Say --yes.")
    typer.confirm(f"Rent {quote.offer.machine}, or one of the other offers above?", abort=True)


def _start(
    launch: Launch, task: dict[str, Any], root: Path, base: str | None, earlier: LaunchRecord | None
) -> None:
    """Hand the task to SkyPilot, and note the launch in ``root``; what came to nothing is not noted."""
    # Before the start: Ctrl-C ends the waiting, not what SkyPilot does.
    write_record(root, LaunchRecord.of(launch, base))
    try:
        sky.start(launch, task)
    except CloudError:
        if not sky.knows(launch):
            if earlier is None:
                remove_record(root, launch.name)
            else:
                write_record(root, earlier)
        raise
    console.print(
        f"Launched [bold]{escape(launch.name)}[/]. Next: lorasmith launch status | logs | down | fetch "
        f"{escape(launch.name)}"
    )
    if launch.serve_port is not None:
        console.print(
            f"The server's address, once it is there: {sky.find_sky()} status {launch.job} --endpoint "
            f"{launch.serve_port}",
            soft_wrap=True,
        )


class _Readable(yaml.SafeDumper):
    """Writes a script as it is, line by line."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Readable.add_representer(str, _Readable.represent_str)


def _act(action: str, words: Sequence[str], root: Path) -> None:
    if len(words) > 1:
        raise SettingsError(f"lorasmith launch {action} takes one name, not {len(words)}.")
    if action == "status":
        if words:
            raise SettingsError("lorasmith launch status takes no name: it shows every launch.")
        _print_records(root)
        machines, jobs = sky.run_sky(["status"]), sky.run_sky(["jobs", "queue"])
        raise typer.Exit(machines or jobs)
    record = find_record(root, words[0] if words else None)
    if action == "fetch":
        run_dir = fetch(record, root)
        console.print(f"The run is here: [bold]{escape(str(run_dir))}[/]. Look at it: lorasmith runs")
    elif action == "logs":
        raise typer.Exit(
            sky.run_sky(["jobs", "logs", "--name", record.job] if record.managed else ["logs", record.job])
        )
    else:
        named = ["jobs", "cancel", "--name", record.job] if record.managed else ["down", record.job]
        raise typer.Exit(sky.run_sky([*named, "--yes"]))


def _print_records(root: Path) -> None:
    records = read_records(root)
    if not records:
        raise RunError(f"Nothing was launched from {root}. Another folder of runs: --root DIR.")
    table = Table("launch", "SkyPilot's name", "copy", "launched (UTC)", box=None, pad_edge=False)
    for record in records:
        kind = "job" if record.managed else "machine"
        table.add_row(
            f"[bold]{escape(record.name)}[/]",
            f"{kind} {escape(record.job)}",
            escape(f"{record.bucket}/{record.name}"),
            record.launched[:16].replace("T", " "),
        )
    console.print(table)
