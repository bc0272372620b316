"""Measure a step of each tuning method over one pack, with the engine's layers and with PEFT's own in turn.

    python bench/methods_cpu.py [--model smollm2-135m] [--tokens 357] [--rounds 3] [--methods lora,boft,dora]

Forward and backward in float32 with the method's defaults; the pack, its attention and its loss are the engine's on
both sides, so what differs are the adapted layers alone. Losses must agree. Methods with virtual tokens have no packs.
"""

import argparse
import statistics
import time
from typing import Any

import torch

from lorasmith.engine.forward import PackForward
from lorasmith.engine.settings import EngineSettings
from lorasmith.model.base import load_base, resolve_base
from lorasmith.model.device import DeviceChoice
from lorasmith.model.memory import keep_freed_memory
from lorasmith.model.method_settings import METHODS
from lorasmith.model.methods import attach_adapter
from lorasmith.model.settings import BUILT_IN, BaseSettings
from lorasmith.packing.trie import Pack
from memory import EXAMPLE_TOKENS, make_pack

PACKED = [name for name in METHODS if name not in ("prompt", "prefix", "p_tuning", "full")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=BUILT_IN)
    parser.add_argument("--tokens", type=int, default=357, help="size of the pack")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", default=",".join(PACKED), help="some of " + ", ".join(PACKED))
    arguments = parser.parse_args()
    keep_freed_memory()
    print("method     engine s  PEFT's layers s  ratio  tokens/s", flush=True)
    for name in arguments.methods.split(","):
        model = load_base(
            resolve_base(BaseSettings(model=arguments.model)),
            DeviceChoice(torch.device("cpu"), torch.float32, "for the comparison"),
        )
        pack = make_pack(arguments.tokens // (EXAMPLE_TOKENS - 1), model.config.vocab_size)
        method: Any = METHODS[name]()
        model = attach_adapter(model, method, seed=0, num_steps=1000).train()
        fast, plain = [], []
        for _ in range(arguments.rounds + 1):  # the first brings the weights in
            ours, loss = one_pass(model, pack, fused=True)
            theirs, same_loss = one_pass(model, pack, fused=False)
            assert abs(loss - same_loss) <= 1e-5 * abs(loss), (name, loss, same_loss)
            fast.append(ours)
            plain.append(theirs)
        ours, theirs = statistics.median(fast[1:]), statistics.median(plain[1:])
        print(
            f"{name:9} {ours:9.2f}  {theirs:15.2f}  {theirs / ours:5.2f}  {pack.num_tokens / ours:8.0f}",
            flush=True,
        )


def one_pass(model: torch.nn.Module, pack: Pack, *, fused: bool) -> tuple[float, float]:
    """Return the seconds of a forward and backward pass, and the loss."""
    forward = PackForward(model, EngineSettings(compile=False, fused_lora=fused))  # type: ignore[arg-type]
    model.zero_grad()
    started = time.perf_counter()
    loss = forward.summed_loss(pack)
    loss.backward()
    return time.perf_counter() - started, loss.item()


if __name__ == "__main__":
    main()
