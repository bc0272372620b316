"""The bound: how fast this machine multiplies matrices of the model's own shapes, measured between the others' steps.

    python matrix_products.py SHAPE.json DTYPE DEVICE THREADS ROWS

A sweep does what a training step does with every frozen linear layer, ``X [rows, in] W^T`` and
``dY [rows, out] W``, once for each distinct shape, and weighs the times by how often the model has it.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median

import torch

from side_by_side.workers import Channel

REPEATS = 3


def main() -> None:
    channel = Channel()
    linear = json.loads(Path(sys.argv[1]).read_text())
    dtype, device = getattr(torch, sys.argv[2]), torch.device(sys.argv[3])
    torch.set_num_threads(int(sys.argv[4]))
    rows = int(sys.argv[5])
    with torch.no_grad():
        operands = [
            tuple(torch.randn(*size, dtype=dtype, device=device) for size in ((rows, i), (rows, o), (o, i)))
            for o, i, _ in linear
        ]
        channel.send({"rows": rows})
        while True:
            channel.wait()
            seconds = 0.0
            for (_, _, count), (inputs, grads, weight) in zip(linear, operands, strict=True):
                times = [time_products(inputs, grads, weight) for _ in range(REPEATS)]
                seconds += count * median(times)
            flop = sum(4 * o * i * count * rows for o, i, count in linear)
            channel.send({"flop_a_second": flop / seconds})


def time_products(inputs: torch.Tensor, grads: torch.Tensor, weight: torch.Tensor) -> float:
    if inputs.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    inputs @ weight.T
    grads @ weight
    if inputs.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
