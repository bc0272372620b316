"""How many CPU threads to compute with: on a busy machine, fewer can be faster."""

import time
from statistics import median

import torch

from lorasmith.data.workers import count_cores

_ROUNDS = 12
_CLEARLY_FASTER = 1.5  # a moment's load must not decide a whole run


def choose_threads() -> tuple[int, str]:
    """Return the fastest thread count for a training step's products on this machine as it is now, and why.

    With every parallel region the threads wait for the last of them; one that another program has pushed off
    its core holds up all. So all cores are measured against half of them and against one, in turns (0.3 s),
    and fewer than all are taken only if they are clearly faster.
    """
    most = count_cores()
    counts = sorted({most, max(1, most // 2), 1}, reverse=True)
    if len(counts) == 1:
        return most, "the only core"
    generator = torch.Generator().manual_seed(0)  # the user's random stream must not move
    rows, weight = torch.randn(384, 576, generator=generator), torch.randn(1536, 576, generator=generator)
    before = torch.get_num_threads()
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for round_number in range(_ROUNDS + 1):
        for count in counts:
            torch.set_num_threads(count)
            started = time.perf_counter()
            for _ in range(3):
                torch.relu(rows @ weight.T)
            if round_number:  # the first builds thread pools
                seconds[count].append(time.perf_counter() - started)
    torch.set_num_threads(before)
    medians = {count: median(times) for count, times in seconds.items()}
    best = min(counts, key=lambda count: medians[count])
    if medians[most] < _CLEARLY_FASTER * medians[best]:
        return most, "all cores"
    return best, f"{medians[most] / medians[best]:.1f}x faster than {most} on this machine, which is busy"
