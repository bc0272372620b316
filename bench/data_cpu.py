"""Reading, tokenising and packing many rows, side by side with TRL and LLaMA-Factory.

    python bench/data_cpu.py --data alpaca_600.json --json data.json         50,000 rows, 3 rounds
    python bench/data_cpu.py --data alpaca_600.json --rows 5000 --rounds 1

The rows are made of the data file's by a seeded generator: other numbers, a tenth of the words exchanged, all
distinct. Each run is a process of its own with empty caches, and the tools take turns. The clock runs from the
opened file to packed rows; starting Python and importing are outside of it. All must find the same rows, tokens
and learnt tokens, or nothing is reported.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from side_by_side.measured import MeasuredError, run_measured
from side_by_side.report import gib, print_table, tell, write_report
from side_by_side.rows import fold_input, read_rows, resample_rows, write_jsonl
from side_by_side.workers import BENCH, peer_python

TOOLS = ("lorasmith", "trl", "llamafactory")
ROOM_TOKENS = 64  # what the chat template adds, generously


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="lorasmith-bench-") as folder:
        base, newline = resolve_tokenizer(options.base)
        files = write_rows(Path(folder), options, base)
        contenders = [
            (tool, workers)
            for tool in options.only
            for workers in ((None,) if tool == "lorasmith" else options.workers)
        ]
        results: dict[tuple[str, Any], list[dict[str, Any]]] = {contender: [] for contender in contenders}
        for number in range(options.rounds):
            for tool, workers in contenders:
                python = {"lorasmith": sys.executable, "trl": peer_python()}.get(tool)
                command = [
                    python or peer_python(".venv-llamafactory"),
                    str(BENCH / "contenders" / f"data_{tool}.py"),
                ]
                command += [
                    str(files[tool]),
                    base,
                    str(options.max_seq_len),
                    *([str(workers)] if workers else []),
                ]
                try:
                    result = run_measured(command)
                except MeasuredError as fault:
                    sys.exit(f"Nothing is reported. {tool}: {fault}")
                results[tool, workers].append(result)
                tell(f"  round {number + 1}: {name_of(tool, workers)} {result['seconds']:.1f} s")
    check_equal(results, newline)
    summary = summarise(results)
    print(f"\n{options.rows:,} rows like those of {options.data.name}; {options.rounds} rounds, medians.\n")
    print_table(
        ["tool", "seconds", "rows/s", "tokens/s", "lorasmith faster", "peak memory, all processes"],
        [
            [
                entry["name"],
                f"{entry['seconds']:.1f}",
                f"{entry['rows_per_second']:,.0f}",
                f"{entry['tokens_per_second']:,.0f}",
                f"{entry['lorasmith_is_faster_by']:.2f} times" if "lorasmith_is_faster_by" in entry else "",
                gib(entry["peak_bytes"]),
            ]
            for entry in summary
        ],
    )
    if options.json:
        raw = {name_of(*contender): taken for contender, taken in results.items()}
        write_report(options.json, {"data_file": options.data.name, "summary": summary, "runs": raw})


def name_of(tool: str, workers: int | None) -> str:
    return (
        tool if workers is None else f"{tool}, {workers} processes" if workers > 1 else f"{tool}, 1 process"
    )


def resolve_tokenizer(base: str | None) -> tuple[str, int]:
    """Return the folder of the base, and the id of the line break that the peers' templates end with."""
    from lorasmith.model.base import load_tokenizer, resolve_base
    from lorasmith.model.settings import BaseSettings

    resolved = resolve_base(BaseSettings(model=base) if base else BaseSettings(), tell=tell)
    (newline,) = load_tokenizer(resolved)("\n", add_special_tokens=False).input_ids
    return str(resolved.folder), newline


def write_rows(folder: Path, options: argparse.Namespace, base: str) -> dict[str, Path]:
    """Write the same rows as each tool wants them: Alpaca for two, prompt and completion messages for TRL."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{base}/tokenizer.json")
    rows = []
    drawn = resample_rows(read_rows(options.data), 20 * options.rows)
    while len(rows) < options.rows and (some := [fold_input(row) for row in itertools.islice(drawn, 1000)]):
        texts = tokenizer.encode_batch([f"{row['instruction']}\n{row['output']}" for row in some])
        rows += [
            r for r, t in zip(some, texts, strict=True) if len(t.ids) + ROOM_TOKENS <= options.max_seq_len
        ]
    del rows[options.rows :]
    if len(rows) < options.rows:
        sys.exit(f"{options.data} has too few rows that fit into --max-seq-len {options.max_seq_len}.")
    alpaca, messages = folder / "alpaca.jsonl", folder / "messages.jsonl"
    write_jsonl(alpaca, iter(rows))
    turns = (
        {
            "prompt": [{"role": "user", "content": row["instruction"]}],
            "completion": [{"role": "assistant", "content": row["output"]}],
        }
        for row in rows
    )
    write_jsonl(messages, turns)
    return {"lorasmith": alpaca, "llamafactory": alpaca, "trl": messages}


def check_equal(results: dict[tuple[str, Any], list[dict[str, Any]]], newline: int) -> None:
    """End the program unless all found the same tokens.

    The chat template writes a line break after the end token. lorasmith leaves it out, since nobody needs it;
    the others keep and learn it: one more token a row, of a known id.
    """
    expected = None
    for (tool, workers), runs in results.items():
        for run in runs:
            breaks = 0 if tool == "lorasmith" else run["num_rows"]
            found = (
                run["num_rows"],
                run["num_tokens"] - breaks,
                run["num_learnt"] - breaks,
                run["sum_of_ids"] - breaks * newline,
            )
            expected = expected or found
            if found != expected:
                sys.exit(
                    f"Nothing is reported: rows, tokens, learnt tokens and the sum of ids are {expected} with "
                    f"{name_of(*next(iter(results)))} and {found} with {name_of(tool, workers)}."
                )


def summarise(results: dict[tuple[str, Any], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    ours = next((runs for (tool, _), runs in results.items() if tool == "lorasmith"), None)
    summary = []
    for (tool, workers), runs in results.items():
        seconds = median(run["seconds"] for run in runs)
        entry = {
            "name": name_of(tool, workers),
            "seconds": seconds,
            "rows_per_second": runs[0]["num_rows"] / seconds,
            "tokens_per_second": runs[0]["num_tokens"] / seconds,
            "peak_bytes": max(run["peak_bytes"] for run in runs),
        }
        if ours and tool != "lorasmith":
            ratios = [theirs["seconds"] / mine["seconds"] for mine, theirs in zip(ours, runs, strict=True)]
            entry["lorasmith_is_faster_by"] = median(ratios)
        summary.append(entry)
    return summary


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="Alpaca rows, as .json or .jsonl, to make the rows of")
    add("--base", help="folder of a transformers model whose tokenizer to use; default: the built-in base")
    add("--rows", type=int, default=50_000)
    add("--rounds", type=int, default=3)
    add("--max-seq-len", type=int, default=512)
    add("--workers", type=int, nargs="+", default=[1, 2], help="processes of the peers to try (default: 1 2)")
    add("--only", nargs="+", choices=TOOLS, default=list(TOOLS))
    add("--json", type=Path, help="write everything that was measured here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
