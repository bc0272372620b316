"""How time grows with the number of rows, with the length of examples, and with what they share.

    python bench/scaling.py rows --sizes 1000 10000 100000 1000000      reading, tokenising, packing; memory
    python bench/scaling.py length --lengths 32 64 128 256 512 1024     seconds an example, training
    python bench/scaling.py prefix --percent 0 30 60 90                 the same, by the share of common prefix
    python bench/scaling.py length --tiny --json length.json --png length.png

``rows`` starts each size twice: with empty caches, and again when the data is ready. The training parts measure
whole steps of lorasmith through its public way, on the built-in base unless --base names another; the first
step of each point is not counted.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from side_by_side.measured import run_measured
from side_by_side.report import gib, print_table, tell, write_report
from side_by_side.rows import random_text, read_rows, resample_rows, synthetic_rows, write_jsonl
from side_by_side.shapes import make_base

ROOM_TOKENS = 64  # for what the prompt recipe adds to an example


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="lorasmith-scaling-") as folder:
        points = options.measure(options, Path(folder))
    head, rows = options.tabulate(points)
    print()
    print_table(head, rows)
    if options.png:
        draw(options, points)
    if options.json:
        write_report(options.json, {"part": options.part, "points": points})


def resolve(options: argparse.Namespace, folder: Path) -> str:
    """Return the folder of the base."""
    if options.tiny:
        return str(make_base("tiny", folder / "tiny"))
    from lorasmith.model.base import resolve_base
    from lorasmith.model.settings import BaseSettings

    return str(
        resolve_base(BaseSettings(model=options.base) if options.base else BaseSettings(), tell=tell).folder
    )


def measure_rows(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    base = resolve(options, folder)
    source = read_rows(options.data) if options.data else None
    points = []
    for size in options.sizes:
        path, cache = folder / f"{size}.jsonl", folder / f"cache-{size}"
        write_jsonl(path, resample_rows(source, size) if source else synthetic_rows(size))
        point: dict[str, Any] = {"rows": size, "file_bytes": path.stat().st_size}
        for start in ("first", "second"):
            packs = ["--pack"] if start == "first" else []
            command = [sys.executable, __file__, "prepare", "--path", str(path), "--base", base, *packs]
            point[start] = run_measured(command, {"LORASMITH_CACHE": str(cache)})
            tell(f"  {size:,} rows, {start} start: {point[start]['wall_seconds']:.1f} s")
        path.unlink()
        points.append(point)
    return points


def prepare(options: argparse.Namespace) -> None:
    """Be the measured process of ``rows``: prepare the data set, pack an epoch if told to, print one JSON line."""
    import numpy as np
    from transformers import AutoTokenizer

    from lorasmith.data.dataset import prepare_dataset
    from lorasmith.data.prompts import choose_recipe
    from lorasmith.data.settings import DataSettings, PromptSettings
    from lorasmith.packing.trie import pack_examples

    tokenizer = AutoTokenizer.from_pretrained(options.base)
    recipe, _ = choose_recipe(PromptSettings(), tokenizer)
    started = time.perf_counter()
    dataset = prepare_dataset(
        DataSettings(train=str(options.path), max_seq_len=512, overlong="drop"), recipe, tokenizer
    )
    prepared = time.perf_counter()
    order = np.random.default_rng(0).permutation(len(dataset)) if options.pack else []
    for low in range(0, len(order), 32):
        pack_examples(dataset, order[low : low + 32].tolist(), max_tokens=8192)
    result = {
        "tokenise_seconds": prepared - started,
        "pack_seconds": time.perf_counter() - prepared,
        "num_tokens": int(dataset.lengths.sum()),
        "num_examples": len(dataset),
    }
    print(json.dumps(result))


def tabulate_rows(points: list[dict[str, Any]]) -> tuple[list[str], list[list[object]]]:
    head = ["rows", "tokens", "read, tokenise", "us a row", "pack an epoch", "us a row", "peak memory"]
    head += ["second start", "its memory"]
    rows = []
    for point in points:
        first, second, size = point["first"], point["second"], point["rows"]
        rows.append(
            [
                f"{size:,}",
                f"{first['num_tokens']:,}",
                f"{first['tokenise_seconds']:.1f} s",
                f"{first['tokenise_seconds'] / size * 1e6:.0f}",
                f"{first['pack_seconds']:.1f} s",
                f"{first['pack_seconds'] / size * 1e6:.0f}",
                gib(first["peak_bytes"]),
                f"{second['tokenise_seconds']:.2f} s",
                gib(second["peak_bytes"]),
            ]
        )
    return head, rows


def measure_length(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Train on examples of about each length, with nothing in common but the recipe's own words."""
    base = resolve(options, folder)
    points = []
    for length in options.lengths:
        num_words = max(2, length - options.recipe_tokens)
        rows = [
            {
                "instruction": random_text(num_words // 2, 2 * i),
                "output": random_text(num_words // 2, 2 * i + 1),
            }
            for i in range(options.batch_size * (options.steps + 1))
        ]
        points.append({"wanted": length, **train_steps(options, folder, f"length-{length}", base, rows)})
    return points


def measure_prefix(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Train on examples of one length, of which a growing part is the same text at the beginning."""
    base = resolve(options, folder)
    points = []
    for percent in options.percent:
        num_words = options.length - options.recipe_tokens
        num_shared = round(num_words * percent / 100)
        num_own = max(4, num_words - num_shared)
        shared = random_text(num_shared, 0)
        rows = [
            {
                "instruction": f"{shared} {random_text(num_own // 2, 2 * i + 1)}".strip(),
                "output": random_text(num_own - num_own // 2, 2 * i + 2),
            }
            for i in range(options.batch_size * (options.steps + 1))
        ]
        points.append({"wanted": percent, **train_steps(options, folder, f"prefix-{percent}", base, rows)})
    return points


def train_steps(
    options: argparse.Namespace, folder: Path, name: str, base: str, rows: list[dict[str, str]]
) -> dict[str, Any]:
    """Train a warm-up step and ``options.steps`` more on ``rows``; return medians of a step."""
    from lorasmith.cli.run_file import load_run_file, prepare
    from lorasmith.training.job import hold_run, run_job

    path = folder / f"{name}.jsonl"
    write_jsonl(path, iter(rows))
    settings = {
        "base.model": base,
        "data.train": str(path),
        "data.max_seq_len": 4 * max(options.lengths if options.part == "length" else [options.length])
        + ROOM_TOKENS,
        "data.cache_dir": str(folder / "cache"),
        "method.r": 8,
        "training.batch_size": options.batch_size,
        "training.learning_rate": 2e-4,
        "training.epochs": 2,  # never gets so far: the last step would save
        "training.save_every": 10**9,
        **dict(setting.split("=", 1) for setting in options.set),
    }
    run_file = load_run_file(None, [f"{key}={value}" for key, value in settings.items()], environ={})
    with hold_run(folder / name):
        job = prepare(run_file, folder / name)
        lengths = [len(job.dataset[i].input_ids) for i in range(len(job.dataset))]
        steps = run_job(job)
        reports = [next(steps) for _ in range(options.steps + 1)][1:]
        steps.close()
    seconds = median(report.seconds for report in reports)
    point = {
        "tokens_an_example": sum(lengths) / len(lengths),
        "seconds_an_example": seconds / options.batch_size,
        "computed_tokens_an_example": median(report.num_tokens for report in reports) / options.batch_size,
        "steps": [{"seconds": report.seconds, "num_tokens": report.num_tokens} for report in reports],
    }
    tell(f"  {name}: {point['seconds_an_example']:.3f} s an example")
    return point


def tabulate_training(first: str) -> Any:
    def tabulate(points: list[dict[str, Any]]) -> tuple[list[str], list[list[object]]]:
        head = [
            first,
            "tokens an example",
            "computed",
            "seconds an example",
            "ms a token",
            "against the first",
        ]
        reference = points[0]["seconds_an_example"]
        rows: list[list[object]] = [
            [
                point["wanted"],
                f"{point['tokens_an_example']:.0f}",
                f"{point['computed_tokens_an_example']:.0f}",
                f"{point['seconds_an_example']:.3f}",
                f"{point['seconds_an_example'] / point['tokens_an_example'] * 1e3:.2f}",
                f"{point['seconds_an_example'] / reference:.2f}",
            ]
            for point in points
        ]
        return head, rows

    return tabulate


def draw(options: argparse.Namespace, points: list[dict[str, Any]]) -> None:
    """Write the part's curve as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    if options.part == "rows":
        sizes = [point["rows"] for point in points]
        for key, label in (("tokenise_seconds", "read and tokenise"), ("pack_seconds", "pack an epoch")):
            axes.plot(sizes, [point["first"][key] for point in points], marker="o", label=label)
        axes.set(xscale="log", yscale="log", xlabel="rows", ylabel="seconds")
        axes.legend()
    else:
        x = "tokens_an_example" if options.part == "length" else "wanted"
        label = (
            "tokens an example" if options.part == "length" else "% of the words that all examples begin with"
        )
        axes.plot(
            [point[x] for point in points], [point["seconds_an_example"] for point in points], marker="o"
        )
        axes.set(xlabel=label, ylabel="seconds an example")
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    figure.savefig(options.png, dpi=120)
    print(f"Written: {options.png}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    everywhere = argparse.ArgumentParser(add_help=False)
    everywhere.add_argument("--base", help="folder of a transformers model; default: the built-in base")
    everywhere.add_argument("--tiny", action="store_true", help="a two-layer model of random weights")
    everywhere.add_argument("--json", type=Path, help="write everything that was measured here")
    everywhere.add_argument("--png", type=Path, help="draw the curve here")
    training = argparse.ArgumentParser(add_help=False)
    training.add_argument("--batch-size", type=int, default=8)
    training.add_argument("--steps", type=int, default=2, help="measured steps a point (default: 2)")
    training.add_argument("--recipe-tokens", type=int, default=32, help="tokens that the chat template adds")
    training.add_argument("--set", nargs="+", default=[], metavar="SECTION.KEY=VALUE")

    rows = parts.add_parser("rows", parents=[everywhere])
    rows.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    rows.add_argument("--data", type=Path, help="make the rows of this file's; default: synthetic ones")
    rows.set_defaults(measure=measure_rows, tabulate=tabulate_rows)
    length = parts.add_parser("length", parents=[everywhere, training])
    length.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024], help="tokens")
    length.set_defaults(measure=measure_length, tabulate=tabulate_training("length"))
    prefix = parts.add_parser("prefix", parents=[everywhere, training])
    prefix.add_argument("--percent", type=int, nargs="+", default=[0, 15, 30, 45, 60, 75, 90])
    prefix.add_argument("--length", type=int, default=256, help="tokens an example (default: 256)")
    prefix.set_defaults(measure=measure_prefix, tabulate=tabulate_training("% shared"))
    measured = parts.add_parser("prepare", help="used by rows for its measured processes")
    measured.add_argument("--path", type=Path, required=True)
    measured.add_argument("--base", required=True)
    measured.add_argument("--pack", action="store_true")
    options = parser.parse_args()
    if options.part == "prepare":
        prepare(options)
        sys.exit()
    return options


if __name__ == "__main__":
    main()
