"""Compare the peak memory that is computed without weights with the peak that is measured, on this machine's CPU.

    python bench/memory.py [--model smollm2-135m] [--tokens 119,238,476]

Prints one table: what lives at once in a rehearsal, what the process takes in a forward and backward pass of the
same pack, and the peak of the whole process computed and measured.
"""

import argparse

import numpy as np
import torch

from lorasmith.data.tokens import IGNORE_INDEX, TokenizedExample
from lorasmith.engine.forward import PackForward
from lorasmith.engine.settings import EngineSettings
from lorasmith.model.base import load_base, resolve_base
from lorasmith.model.device import DeviceChoice
from lorasmith.model.memory import keep_freed_memory
from lorasmith.model.method_settings import LoraSettings
from lorasmith.model.methods import attach_adapter
from lorasmith.model.settings import BUILT_IN, BaseSettings
from lorasmith.packing.trie import pack_examples
from lorasmith.training.fit import _WASTE, _page_in, _resident, _try_pack
from lorasmith.training.rehearsal import Rehearsal, copy_without_weights

MIB = 2**20
EXAMPLE_TOKENS = 120


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=BUILT_IN)
    parser.add_argument("--tokens", default="119,238,476", help="sizes of packs, multiples of 119")
    arguments = parser.parse_args()
    keep_freed_memory()
    device = torch.device("cpu")
    base = resolve_base(BaseSettings(model=arguments.model))
    model = load_base(base, DeviceChoice(device, torch.float32, "for the comparison"))
    model = attach_adapter(model, LoraSettings(), seed=0).train()
    rehearsal = Rehearsal(copy_without_weights(model), EngineSettings())
    forward = PackForward(model, EngineSettings())
    _page_in(model)
    print(
        "activations  tokens  lives at once  taken  peak measured  peak computed  computed / measured  tokens/s"
    )
    for recompute in (False, True):
        for tokens in map(int, arguments.tokens.split(",")):
            pack = make_pack(tokens // (EXAMPLE_TOKENS - 1), model.config.vocab_size)
            lives = rehearsal.of(pack, checkpointing=recompute).peak_bytes
            before = _resident(device)
            measured = _try_pack(model, forward, pack, recompute)
            if measured is None:
                raise SystemExit(f"out of memory at {tokens} tokens")
            peak, seconds = measured
            computed = before + _WASTE["cpu"][recompute] * lives
            print(
                f"{'recomputed' if recompute else 'kept':11}  {pack.num_tokens:6}  {lives / MIB:9,.0f} MiB  "
                f"{peak.taken / MIB:5,.0f}  {peak.during / MIB:9,.0f} MiB  {computed / MIB:9,.0f} MiB  "
                f"{computed / peak.during:19.2f}  {pack.num_tokens / seconds:8.0f}"
            )


def make_pack(num_examples: int, vocabulary: int):
    random = np.random.default_rng(0)
    examples = []
    for number in range(num_examples):
        ids = random.integers(10, vocabulary - 10, EXAMPLE_TOKENS).astype(np.int32)
        labels = np.where(np.arange(EXAMPLE_TOKENS) < EXAMPLE_TOKENS // 2, IGNORE_INDEX, ids)
        examples.append(TokenizedExample(ids, labels.astype(np.int32), f"made up:{number + 1}"))
    return pack_examples(examples, range(num_examples), max_tokens=1 << 20)[0]


if __name__ == "__main__":
    main()
