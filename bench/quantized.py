"""Measure what base.quantization costs and saves: memory and speed of none, int8 and nf4, each in its own process.

    python bench/quantized.py [--model smollm2-135m] [--tokens 476]

The step is that of training: LoRA of rank 16 on all linear layers, one pack forward and backward, the second of two.
"""

import argparse
import subprocess
import sys

import psutil
import torch

from lorasmith.engine.forward import PackForward
from lorasmith.engine.settings import EngineSettings
from lorasmith.model.base import load_base, resolve_base
from lorasmith.model.device import DeviceChoice
from lorasmith.model.memory import give_back_freed_memory, keep_freed_memory
from lorasmith.model.method_settings import LoraSettings
from lorasmith.model.methods import attach_adapter
from lorasmith.model.settings import BUILT_IN, BaseSettings
from lorasmith.training.fit import _page_in, _try_pack
from memory import EXAMPLE_TOKENS, MIB, make_pack

KINDS = ("none", "int8", "nf4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=BUILT_IN)
    parser.add_argument("--tokens", type=int, default=476, help="size of the pack")
    parser.add_argument("--kind", choices=KINDS, help="measure this one here")
    arguments = parser.parse_args()
    if arguments.kind is not None:
        measure(arguments.kind, arguments.model, arguments.tokens)
        return
    print("base   weights  process before a step  peak in a step  tokens/s", flush=True)
    for kind in KINDS:
        subprocess.run([sys.executable, *sys.argv, "--kind", kind], check=True)


def measure(kind: str, model_id: str, num_tokens: int) -> None:
    """Print one row of the table."""
    keep_freed_memory()
    device = torch.device("cpu")
    choice = DeviceChoice(device, torch.float32, "for the comparison")
    model = load_base(resolve_base(BaseSettings(model=model_id)), choice, quantization=kind)
    model = attach_adapter(model, LoraSettings(), seed=0).train()
    forward = PackForward(model, EngineSettings(compile=False))
    _page_in(model)
    give_back_freed_memory()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    before = psutil.Process().memory_info().rss
    pack = make_pack(num_tokens // (EXAMPLE_TOKENS - 1), model.config.vocab_size)
    measured = _try_pack(model, forward, pack, recompute=False)
    if measured is None:
        raise SystemExit("out of memory; take fewer --tokens")
    peak, seconds = measured
    print(
        f"{kind:5}  {weights / MIB:3,.0f} MiB  {before / MIB:17,.0f} MiB  {peak.during / MIB:10,.0f} MiB  "
        f"{pack.num_tokens / seconds:8.0f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
