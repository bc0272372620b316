"""A LoRA step on a CUDA GPU, side by side with TRL: tokens a second, peak memory, model FLOP utilisation (MFU).

    python bench/sft_gpu.py --shape llama-3.2-1b --data alpaca_600.json --models /tmp/models --json 1b.json
    python bench/sft_gpu.py --shape llama-2-7b --data alpaca_600.json --models /tmp/models
    python bench/sft_gpu.py --tiny --data alpaca_600.json          every code path on a CPU, no result worth reading

Models have the real sizes and random weights, made from configs into ``--models``. TRL runs at the best of
padded, flattened and packed rows, of the attention kernels and with Liger's where they are installed.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from side_by_side.flops import read_shape
from side_by_side.report import tell, write_report
from side_by_side.sft import Comparison, Setting, UnequalError, print_result
from side_by_side.shapes import SHAPES, make_base
from side_by_side.task import Task
from side_by_side.workers import WorkerDiedError, peer_python

# Dense bf16 tensor-core rates in TFLOP/s, from NVIDIA's data sheets (without sparsity). The first name that the
# device's name contains counts.
PEAK_TFLOPS = {
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H200": 989,
    "B200": 2250,
    "A100": 312,
    "A40": 150,
    "A10G": 70,
    "A10": 125,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX A6000": 155,
    "RTX 4090": 165,
    "RTX 3090": 71,
}
PER_DEVICE = {"trl-padded": (8, 16, 32), "trl-flat": (8, 16, 32), "trl-packed": (1, 4, 8)}


def main() -> None:
    options = parse_arguments()
    device, peak, peak_source = find_device(options)
    with tempfile.TemporaryDirectory(prefix="lorasmith-bench-") as work_dir:
        shape = "tiny" if options.tiny else options.shape
        dtype = "float32" if options.tiny else "bfloat16"
        models = Path(options.models or work_dir)
        tell(f"{shape}: making the model, or finding it, in {models}")
        base = make_base(shape, models / shape, dtype, device)
        task = Task(
            base=str(base),
            data=str(options.data.resolve()),
            recipe="chat",
            max_seq_len=options.max_seq_len,
            batch_size=options.batch_size,
            num_steps=options.warmup + options.rounds,
            dtype=dtype,
            device=device,
            threads=options.threads,
            r=8,
            lora_alpha=16,
            learning_rate=2e-4,
            work_dir=work_dir,
            lorasmith_settings=tuple(options.set),
        )
        try:
            comparison = Comparison(task, read_shape(task.base, task.r))
            kernels = comparison.choose("kernels", kernel_candidates(options))
            if kernels is None:
                sys.exit(
                    "Nothing is reported. TRL ran with none of the attention kernels; the reasons stand above."
                )
            comparison.add_peer("trl", size_candidates(options, kernels))
            result = comparison.run(
                options.warmup, options.rounds, options.seconds, product_rows=256 if options.tiny else 8192
            )
        except (UnequalError, WorkerDiedError) as fault:
            sys.exit(f"Nothing is reported. {fault}")
    if peak:
        print(f"\nMFU: needed FLOP a second, by {peak / 1e12:,.0f} TFLOP/s ({peak_source}).")
    print_result(result, peak)
    if options.json:
        settings = {"shape": shape, "dtype": dtype, "batch_size": task.batch_size, "set": list(options.set)}
        settings |= {"device": device, "peak_flop_per_second": peak, "peak_source": peak_source}
        write_report(options.json, {"settings": settings, "data_file": options.data.name, **result})


def find_device(options: argparse.Namespace) -> tuple[str, float | None, str]:
    """Return the device, its peak rate in FLOP/s and where that number is from.

    Raises:
        SystemExit: no GPU, or one whose peak rate is not known.
    """
    import torch

    if options.tiny:
        return "cpu", None, ""
    if not torch.cuda.is_available():
        sys.exit(
            "This benchmark needs a CUDA GPU, and torch sees none here. For the CPU there is bench/sft_cpu.py; "
            "--tiny goes through the code on a CPU without measuring anything."
        )
    name = torch.cuda.get_device_name()
    if options.peak_tflops:
        return "cuda", options.peak_tflops * 1e12, f"{name}, as given"
    for known, tflops in PEAK_TFLOPS.items():
        if known in name:
            return "cuda", tflops * 1e12, f"{name}, dense bf16 by its data sheet"
    sys.exit(f"The peak rate of {name} is not known here. Give it: --peak-tflops N (dense bf16).")


def kernel_candidates(options: argparse.Namespace) -> list[Setting]:
    """Return packed rows with each attention, with and without Liger, as far as TRL's environment has them."""
    attentions = ["sdpa"] if options.tiny else ["sdpa", "flex_attention"]
    attentions += ["flash_attention_2"] if peer_has("flash_attn") else []
    has_liger = peer_has("liger_kernel") and not options.tiny
    tell(f"TRL: attention {', '.join(attentions)}; Liger {'also' if has_liger else 'is not installed'}")
    ligers = (False, True) if has_liger else (False,)
    return [Setting("trl-packed", 1, attention, liger) for attention in attentions for liger in ligers]


def size_candidates(options: argparse.Namespace, kernels: Setting) -> list[Setting]:
    """Return padded, flattened and packed rows, some numbers of them a device, with the kernels that were chosen."""
    sizes = dict.fromkeys(PER_DEVICE, (1,)) if options.tiny else PER_DEVICE
    return [
        Setting(setup, number, kernels.attention, kernels.has_liger)
        for setup, numbers in sizes.items()
        for number in numbers
        if setup == "trl-packed" or options.batch_size % number == 0
    ]


def peer_has(module: str) -> bool:
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([peer_python(), "-c", code]).returncode == 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="Alpaca rows, as .json or .jsonl")
    add("--shape", choices=[name for name in SHAPES if name != "tiny"], default="llama-3.2-1b")
    add(
        "--models", help="folder that keeps the models that are made (14 GB for 7B); default: a temporary one"
    )
    add("--max-seq-len", type=int, default=1024)
    add("--batch-size", type=int, default=64, help="examples in an optimizer step (default: 64)")
    add("--rounds", type=int, default=10, help="measured steps of each contender (default: 10)")
    add("--seconds", type=float, default=1800.0, help="end after the round in which this time is over")
    add("--warmup", type=int, default=3, help="steps that are not counted: compilation (default: 3)")
    add("--threads", type=int, default=8)
    add("--peak-tflops", type=float, help="dense bf16 rate of the GPU, for MFU; known for usual ones")
    add("--set", nargs="+", default=[], metavar="SECTION.KEY=VALUE", help="settings for lorasmith alone")
    add("--tiny", action="store_true", help="a two-layer model on the CPU: does the benchmark run?")
    add("--json", type=Path, help="write everything that was measured here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
