"""Put many rows through reading, tokenising and packing; print time, peak memory and the second start's time.

    python bench/data_scale.py                          1,000,000 synthetic Alpaca rows, in a temporary folder
    python bench/data_scale.py --rows 20000 --tokenizer FOLDER

Peak memory is the largest sum of resident sets of the process and its workers, sampled every 0.1 s. Pages of
the token files that are mapped into memory count in it, although the system can take them back at any time.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from lorasmith.data.dataset import prepare_dataset
from lorasmith.data.prompts import choose_recipe
from lorasmith.data.settings import DataSettings, PromptSettings
from lorasmith.packing.trie import pack_examples

TEXT = """
the of and to in is that for it as was with be by on not he his but at are this have from or had an they which
one you were all her would there their we him been has when who will no more if out so up said what its about
than into them can only other time new some could these two may first then do any like my now over such our
even most made after also did many off before must well back through years much where your way down should
because long each just state people those too how little good world make very year still see own work day get
here old between both life being under three never know same last another while us might great go come since
"""
WORDS = TEXT.split()


def write_rows(path: Path, num_rows: int) -> None:
    """Write distinct Alpaca rows whose lengths are like those of the 2023 data: some 60 words each."""
    choose = random.Random(0)
    with path.open("w") as file:
        for number in range(num_rows):
            has_input = choose.random() < 0.4
            row = {
                "instruction": f"Task {number}: {' '.join(choose.choices(WORDS, k=choose.randint(6, 14)))}?",
                "input": " ".join(choose.choices(WORDS, k=choose.randint(5, 25))) if has_input else "",
                "output": f"{' '.join(choose.choices(WORDS, k=choose.randint(10, 70)))}.",
            }
            file.write(json.dumps(row) + "\n")


def run(path: Path, tokenizer_folder: str, *, packs: bool) -> None:
    """Be the measured process: prepare the data set, pack it if told to, print one JSON line."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    data = DataSettings(train=str(path), max_seq_len=512, overlong="drop")
    recipe, _ = choose_recipe(PromptSettings(), tokenizer)
    started = time.perf_counter()

    def progress(rows: int, share: float) -> None:
        print(
            f"\r{rows:>9,} rows  {share:6.1%}  {time.perf_counter() - started:6.1f} s",
            end="",
            file=sys.stderr,
        )

    dataset = prepare_dataset(data, recipe, tokenizer, progress=progress)
    print(file=sys.stderr)
    prepared = time.perf_counter()
    num_packed = pack(dataset) if packs else None
    seconds = {"read and tokenise": prepared - started, "pack": time.perf_counter() - prepared}
    counts = {"rows": len(dataset), "tokens": int(dataset.lengths.sum()), "packed_tokens": num_packed}
    print(json.dumps({"seconds": seconds, **counts}))


def pack(dataset) -> int:
    """Lay out every step of an epoch, 32 examples each in a seeded order; return the number of tokens laid out."""
    order = np.random.default_rng(0).permutation(len(dataset))
    num_tokens = 0
    for low in range(0, len(order), 32):
        packs = pack_examples(dataset, order[low : low + 32].tolist(), max_tokens=8192)
        num_tokens += sum(pack.num_tokens for pack in packs)
    return num_tokens


def measure(command: list[str], environment: dict[str, str]) -> tuple[dict, int]:
    """Run a command; return its JSON line and the peak resident bytes of it and its children."""
    import psutil

    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
    peak = 0

    def sample() -> None:
        nonlocal peak
        parent = psutil.Process(process.pid)
        while process.poll() is None:
            total = 0
            for member in [parent, *parent.children(recursive=True)]:
                try:
                    total += member.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peak = max(peak, total)
            time.sleep(0.1)

    watcher = threading.Thread(target=sample)
    watcher.start()
    output, _ = process.communicate()
    watcher.join()
    if process.returncode:
        sys.exit(f"the measured process failed with exit code {process.returncode}")
    return json.loads(output), peak


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokenizer", help="folder of the tokenizer; default: the built-in base's")
    parser.add_argument("--pack", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        run(options.run, options.tokenizer, packs=options.pack)
        return
    tokenizer_folder = options.tokenizer
    if tokenizer_folder is None:
        from lorasmith.model.base import resolve_base
        from lorasmith.model.settings import BaseSettings

        tokenizer_folder = str(resolve_base(BaseSettings()).folder)
    with tempfile.TemporaryDirectory(prefix="lorasmith-scale-") as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, options.rows)
        print(f"{options.rows:,} rows, {path.stat().st_size / 1e6:,.0f} MB, {os.cpu_count()} cores")
        command = [sys.executable, __file__, "--run", str(path), "--tokenizer", tokenizer_folder]
        environment = {**os.environ, "LORASMITH_CACHE": str(Path(folder) / "cache")}
        for name, flags in (("first start", ["--pack"]), ("second start", [])):
            started = time.perf_counter()
            result, peak = measure([*command, *flags], environment)
            wall = time.perf_counter() - started
            steps = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in result["seconds"].items())
            print(f"{name}: {wall:.1f} s ({steps}), peak {peak / 2**30:.2f} GiB, {result['tokens']:,} tokens")


if __name__ == "__main__":
    main()
