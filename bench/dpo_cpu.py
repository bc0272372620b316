"""A DPO step on the CPU, side by side with TRL's DPOTrainer at its best: pairs a second and memory.

    python bench/dpo_cpu.py --data dpo_240.json --json dpo.json
    python bench/dpo_cpu.py --data dpo_240.json --rounds 5 --setups trl=2

The same pairs in the same order, the same tokens, adapter, beta and constant rate; LoRA r=8 on all linear layers. A
round is one step of each, one after the other. Only the pairs that are needed are read, each is trained on once, and
the time to ask the reference, before the first step or in each, counts: a pair's seconds are those of its step and its
part of what the reference took beforehand. With more epochs that part is paid once, the one in each step every time.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from side_by_side.report import gib, print_table, tell, write_report
from side_by_side.task import Task
from side_by_side.workers import BENCH, Worker, WorkerDiedError, peer_python

SETUPS = ("trl", "trl-precomputed")
# Relative, of the losses of each step. A loss is of sums over whole answers, which bfloat16 rounds by a nat or more:
# TRL's own losses with one and with two pairs a batch differ by a fifth. That the work is the same, float32 shows.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.3}


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="lorasmith-bench-") as work_dir:
        task = make_task(options, Path(work_dir))
        tell(f"{task.batch_size * task.num_steps} pairs, {task.dtype}, {task.threads} threads")
        try:
            result = compare(task, options.setups, options.warmup, options.rounds)
        except WorkerDiedError as fault:
            sys.exit(f"Nothing is reported. {fault}")
    print_result(result)
    if options.json:
        settings = {name: getattr(task, name) for name in ("dtype", "threads", "batch_size", "max_seq_len")}
        write_report(options.json, {"settings": settings, "data_file": options.data.name, **result})


def make_task(options: argparse.Namespace, work_dir: Path) -> Task:
    """Return the task on as many pairs as its steps take, all of which fit."""
    from lorasmith.data.dataset import prepare_dataset
    from lorasmith.data.prompts import choose_recipe
    from lorasmith.data.settings import DataSettings, PromptSettings
    from lorasmith.model.base import load_tokenizer, resolve_base
    from lorasmith.model.settings import BaseSettings

    settings = BaseSettings(model=options.base) if options.base else BaseSettings()
    if options.tiny:
        from side_by_side.shapes import make_base

        settings = BaseSettings(model=str(make_base("tiny", work_dir / "tiny")))
    base = resolve_base(settings, tell=tell)
    text = options.data.read_text("utf-8")
    rows = (
        [json.loads(line) for line in text.splitlines()]
        if options.data.suffix == ".jsonl"
        else json.loads(text)
    )
    every = work_dir / "every.jsonl"
    every.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSettings(
        train=str(every), max_seq_len=options.max_seq_len, overlong="drop", cache_dir=str(work_dir / "cache")
    )
    tokenizer = load_tokenizer(base)
    recipe, _ = choose_recipe(PromptSettings(learn="last"), tokenizer)
    dataset = prepare_dataset(data, recipe, tokenizer, kind="pairs")
    num_steps = options.warmup + options.rounds
    wanted = num_steps * options.batch_size
    fitting = [int(dataset.where(i).rpartition(":")[2]) - 1 for i in range(0, len(dataset), 2)]
    if len(fitting) < wanted:
        sys.exit(
            f"{len(fitting)} pairs of {options.data.name} fit, {wanted} are needed. Give fewer --rounds."
        )
    chosen = work_dir / "pairs.jsonl"
    chosen.write_text("".join(json.dumps(rows[i]) + "\n" for i in fitting[:wanted]))
    return Task(
        base=str(base.folder),
        data=str(chosen),
        recipe="auto",
        max_seq_len=options.max_seq_len,
        batch_size=options.batch_size,
        num_steps=num_steps,
        dtype=options.dtype,
        device="cpu",
        threads=options.threads,
        r=8,
        lora_alpha=16,
        learning_rate=1e-5,
        work_dir=str(work_dir),
        lorasmith_settings=tuple(options.set),
    )


def compare(task: Task, setups: list[tuple[str, int]], warmup: int, rounds: int) -> dict[str, Any]:
    """Return what each contender did: medians over the rounds."""
    path = str(task.write(Path(task.work_dir) / "task.json"))

    def start(name: str, *command: str) -> Worker:
        log = Path(task.work_dir) / f"{name}.log"
        # The references of an earlier run must not be found: asking for them is part of the work.
        environment = {"OMP_NUM_THREADS": str(task.threads), "LORASMITH_CACHE": f"{task.work_dir}/cache"}
        return Worker(name, [*command], log, environment)

    contenders = BENCH / "contenders"
    workers = {"lorasmith": start("lorasmith", sys.executable, str(contenders / "dpo_lorasmith.py"), path)}
    for setup, per_device in setups:
        name = f"{setup} x{per_device}"
        workers[name] = start(
            name, peer_python(), str(contenders / "dpo_trl.py"), path, setup, str(per_device)
        )
        tell(f"  {name}: ready; reference {workers[name].ready['reference_seconds']:.1f} s")
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    for number in range(warmup + rounds):
        for name, worker in workers.items():
            steps[name].append(worker.ask())
        for name, taken in steps.items():
            check_step(name, steps["lorasmith"][-1], taken[-1], task)
        done = "  ".join(f"{name} {taken[-1]['seconds']:.1f} s" for name, taken in steps.items())
        tell(f"  {'warm-up' if number < warmup else f'round {number - warmup + 1}'}: {done}")
    for worker in workers.values():
        worker.close()
    found = []
    for name, taken in steps.items():
        before = workers[name].ready["reference_seconds"] / task.num_steps
        seconds = [step["seconds"] + before for step in taken[warmup:]]
        ours = [step["seconds"] for step in steps["lorasmith"][warmup:]]
        ours = [s + workers["lorasmith"].ready["reference_seconds"] / task.num_steps for s in ours]
        found.append(
            {
                "name": name,
                "packages": workers[name].ready["packages"],
                "pairs_per_second": task.batch_size / median(seconds),
                "tokens_per_second": median(
                    step["num_tokens"] / s for step, s in zip(taken[warmup:], seconds, strict=True)
                ),
                "computed_share": median(
                    step["num_computed"] / step["num_tokens"] for step in taken[warmup:]
                ),
                "lorasmith_is_faster_by": median(t / o for t, o in zip(seconds, ours, strict=True)),
                "reference_seconds": workers[name].ready["reference_seconds"],
                "seconds": [step["seconds"] for step in taken],
                "losses": [step["loss"] for step in taken],
                "peak_bytes": max(step["peak_bytes"] for step in taken),
            }
        )
    return {"rounds": rounds, "contenders": found, "lorasmith_said": workers["lorasmith"].ready["said"]}


def check_step(name: str, ours: dict[str, Any], theirs: dict[str, Any], task: Task) -> None:
    """End where a step is not of the same tokens, or its loss differs: comparing speeds would say nothing."""
    if theirs["num_tokens"] != ours["num_tokens"]:
        sys.exit(
            f"A step has {ours['num_tokens']:,} tokens with lorasmith, {theirs['num_tokens']:,} with {name}."
        )
    if not abs(theirs["loss"] - ours["loss"]) <= TOLERANCE[task.dtype] * ours["loss"]:
        sys.exit(
            f"The loss of a step is {ours['loss']:.6f} with lorasmith, {theirs['loss']:.6f} with {name}."
        )


def print_result(result: dict[str, Any]) -> None:
    head = ["contender", "pairs/s", "tokens/s", "lorasmith faster", "computed", "peak memory", "last loss"]
    print()
    print_table(
        head,
        [
            [
                entry["name"],
                f"{entry['pairs_per_second']:.3f}",
                f"{entry['tokens_per_second']:,.0f}",
                "" if entry["name"] == "lorasmith" else f"{entry['lorasmith_is_faster_by']:.2f} times",
                f"{entry['computed_share']:.0%}",
                gib(entry["peak_bytes"]),
                f"{entry['losses'][-1]:.5f}",
            ]
            for entry in result["contenders"]
        ],
    )
    print(
        "\ncomputed: tokens that go through the layers in a step, padding too and shared ones once, of the pairs'."
    )


def setup_number(text: str) -> tuple[str, int]:
    setup, _, number = text.partition("=")
    if setup not in SETUPS or not number.isdigit():
        raise argparse.ArgumentTypeError(f"{text} is not of the form trl=2")
    return setup, int(number)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="preference rows, as .json or .jsonl")
    add("--base", help="folder of a transformers model; default: the built-in base")
    add("--max-seq-len", type=int, default=512)
    add("--batch-size", type=int, default=2, help="pairs in an optimizer step (default: 2)")
    add("--rounds", type=int, default=3, help="measured steps of each contender (default: 3)")
    add("--warmup", type=int, default=1, help="steps of each contender that are not counted (default: 1)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--threads", type=int, default=2)
    add("--setups", nargs="+", type=setup_number, metavar="SETUP=N",
        default=[("trl", 1), ("trl", 2), ("trl-precomputed", 1), ("trl-precomputed", 2)],
        help="setups of TRL, pairs a device: trl=1 trl=2 trl-precomputed=1 trl-precomputed=2 (default)")  # fmt: skip
    add("--set", nargs="+", default=[], metavar="SECTION.KEY=VALUE", help="settings for lorasmith alone")
    add("--tiny", action="store_true", help="a two-layer model of random weights: does the benchmark run?")
    add("--json", type=Path, help="write everything that was measured here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
