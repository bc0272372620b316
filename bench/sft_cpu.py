"""A LoRA step on the CPU, side by side with the 2023 recipe, transformers.Trainer and TRL: speed and memory.

    python bench/sft_cpu.py --data alpaca_600.json --json alpaca.json
    python bench/sft_cpu.py --data gsm8k_2000.json --rounds 9
    python bench/sft_cpu.py --data alpaca_600.json --only lorasmith trl --per-device trl-flat=8

What is compared, and how it is kept fair: bench/README.md.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from side_by_side.flops import read_shape
from side_by_side.report import tell, write_report
from side_by_side.sft import Comparison, Setting, UnequalError, print_result
from side_by_side.task import Task
from side_by_side.workers import WorkerDiedError

CANDIDATES = {
    "trl": {"trl-padded": (2, 4, 8), "trl-flat": (4, 8, 16), "trl-packed": (1, 2, 4)},
    "trainer": {"trainer": (2, 4, 8)},
    "recipe-2023": {"recipe-2023": (4,)},
}


def main() -> None:
    options = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="lorasmith-bench-") as work_dir:
        base, dtype, reason = resolve(options, work_dir)
        task = Task(
            base=base,
            data=str(options.data.resolve()),
            recipe=options.recipe,
            max_seq_len=options.max_seq_len,
            batch_size=options.batch_size,
            num_steps=options.warmup + options.rounds,
            dtype=dtype,
            device="cpu",
            threads=options.threads,
            r=8,
            lora_alpha=16,
            learning_rate=2e-4,
            work_dir=work_dir,
            lorasmith_settings=tuple(options.set),
        )
        tell(f"dtype {dtype} ({reason}); the 2023 recipe always float32; {task.threads} threads")
        try:
            comparison = Comparison(task, read_shape(base, task.r))
            for name in options.only:
                if name != "lorasmith":
                    comparison.add_peer(name, candidates(name, options))
            result = comparison.run(options.warmup, options.rounds, options.seconds, product_rows=2048)
        except (UnequalError, WorkerDiedError) as fault:
            sys.exit(f"Nothing is reported. {fault}")
    print_result(result)
    settings = {"dtype": dtype, "dtype_reason": reason, "threads": task.threads, "recipe": task.recipe}
    settings |= {"batch_size": task.batch_size, "max_seq_len": task.max_seq_len, "set": list(options.set)}
    if options.json:
        write_report(options.json, {"settings": settings, "data_file": options.data.name, **result})


def candidates(name: str, options: argparse.Namespace) -> list[Setting]:
    """Return the settings to choose from: those named by --per-device, or all that the batch is divided by."""
    named = dict(options.per_device)
    setups = CANDIDATES[name]
    if chosen := [Setting(setup, named[setup]) for setup in setups if setup in named]:
        return chosen
    batch = options.batch_size
    return [Setting(setup, n) for setup, numbers in setups.items() for n in numbers if batch % n == 0]


def resolve(options: argparse.Namespace, work_dir: str) -> tuple[str, str, str]:
    """Return the base's folder, the dtype and its reason."""
    from lorasmith.model.base import resolve_base
    from lorasmith.model.device import choose_device
    from lorasmith.model.settings import BaseSettings

    if options.tiny:
        from side_by_side.shapes import make_base

        base = make_base("tiny", Path(work_dir) / "tiny")
    else:
        settings = BaseSettings(model=options.base) if options.base else BaseSettings()
        base = resolve_base(settings, tell=tell).folder
    choice = choose_device("cpu", options.dtype)
    return str(base), str(choice.dtype).removeprefix("torch."), choice.reason


def setup_number(text: str) -> tuple[str, int]:
    setup, _, number = text.partition("=")
    if setup not in {name for setups in CANDIDATES.values() for name in setups} or not number.isdigit():
        raise argparse.ArgumentTypeError(f"{text} is not of the form trl-packed=2")
    return setup, int(number)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="Alpaca rows, as .json or .jsonl")
    add("--base", help="folder of a transformers model; default: the built-in base")
    add("--recipe", default="auto", help="prompt recipe, as for lorasmith train (default: auto)")
    add("--max-seq-len", type=int, default=512)
    add("--batch-size", type=int, default=16, help="examples in an optimizer step (default: 16)")
    add("--rounds", type=int, default=5, help="measured steps of each contender (default: 5)")
    add("--seconds", type=float, default=3600.0, help="end after the round in which this time is over")
    add("--warmup", type=int, default=1, help="steps of each contender that are not counted (default: 1)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="auto: the faster one here")
    add("--threads", type=int, default=2)
    add("--only", nargs="+", choices=("lorasmith", *CANDIDATES), default=["lorasmith", *CANDIDATES])
    add("--per-device", nargs="+", type=setup_number, default=[], metavar="SETUP=N",
        help="take this instead of trying several, such as trl-packed=2 trainer=8")  # fmt: skip
    add("--set", nargs="+", default=[], metavar="SECTION.KEY=VALUE", help="settings for lorasmith alone")
    add("--tiny", action="store_true", help="a two-layer model of random weights: does the benchmark run?")
    add("--json", type=Path, help="write everything that was measured here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
