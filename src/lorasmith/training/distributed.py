"""Several processes as one run: each computes its share of a step's packs, and their gradients are summed.

    process 0   the step's packs -> its share -> gradients --.
    process 1   the step's packs -> its share -> gradients --+-- one all-reduce -> the same AdamW step everywhere
    process 2   the step's packs -> (no pack left) zeros   --'

Every process cuts the whole step alike and divides by the step's learnt tokens, so the sum of what they find is the
gradient that one process would find, but for the order of its additions. No DistributedDataParallel: it wants as
many backward passes from every process and takes a mean over processes; what is wanted is a sum over packs, of which
one process may have three and another none. An adapter is small enough to be summed in one piece when a step is done.

The run folder belongs to process 0. The others are told what it says over the network, so that machines without a
common disk can work together.

Processes are started by ``torchrun`` or ``lorasmith train --processes N`` and find each other by the
environment variables of torchrun.
"""

import contextlib
import heapq
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from lorasmith.errors import LostProcessError, SettingsError, TrainingError, first_line
from lorasmith.packing.cost import PackCost
from lorasmith.packing.trie import Pack

_Value = TypeVar("_Value")

# While a run is prepared one process may read for long and the others wait.
_PREPARATION = timedelta(hours=6)


@dataclass(frozen=True, slots=True)
class Team:
    """The processes of a run, seen from one of them; alone, every method is what one process would do."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # among those of the same machine
    local_count: int = 1
    lost_after_seconds: float = 600.0
    _steps: Any = None  # the process group of the training steps, with that time limit

    @property
    def is_first(self) -> bool:
        """Whether this process writes, prints, and decides what is measured."""
        return self.rank == 0

    def share(
        self, packs: Sequence[Pack], cost: PackCost, *, evenly: bool = False
    ) -> list[tuple[int, float]]:
        """Return which of ``packs`` this process computes, in their order, and with what weight each counts.

        Together the processes take every pack once, with weight 1. ``evenly``: all make as many passes; who has
        fewer packs computes the cheapest of all once more, with weight 0.
        """
        if self.count == 1:
            return [(place, 1.0) for place in range(len(packs))]
        costs = [cost_of(pack, cost) for pack in packs]
        shares = divide(costs, self.count)
        mine = [(place, 1.0) for place in shares[self.rank]]
        idle = max(map(len, shares)) - len(mine) if evenly else 0
        return mine + [(costs.index(min(costs)), 0.0)] * idle

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace the gradient of each parameter by its sum over all processes; None stays where none has one."""
        if self.count == 1:
            return
        first = parameters[0]
        assert all(p.dtype == first.dtype for p in parameters), "what is trained is float32"
        # Behind the gradients stands for each parameter how many processes have one.
        sizes = [*(p.numel() for p in parameters), len(parameters)]
        flat = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
        *parts, counts = flat.split(sizes)
        counts.copy_(torch.tensor([p.grad is not None for p in parameters]))
        for parameter, part in zip(parameters, parts, strict=True):
            if parameter.grad is not None:
                part.copy_(parameter.grad.flatten())
        with self._awaiting():
            dist.all_reduce(flat, group=self._steps)
        for parameter, part, count in zip(parameters, parts, counts.tolist(), strict=True):
            parameter.grad = part.view_as(parameter) if count else None

    def total(self, *numbers: float) -> list[float]:
        """Return each number summed over all processes, in float64."""
        if self.count == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        with self._awaiting():
            dist.all_reduce(sums, group=self._steps)
        return sums.tolist()

    def any(self, claim: bool) -> bool:
        """Return whether ``claim`` is true in at least one process."""
        return self.total(float(claim))[0] > 0

    def wait(self) -> None:
        """Go on when every process has come here."""
        if self.count > 1:
            with self._awaiting():
                dist.all_reduce(torch.zeros(1))

    def from_first(self, make: Callable[[], _Value]) -> _Value:
        """Return what ``make()`` gives in process 0, a value that JSON can hold; the others do not call it."""
        if self.count == 1:
            return make()
        content = json.dumps(make()).encode() if self.is_first else b""
        return json.loads(self._bytes_from_first(content))

    def read(self, path: Path) -> bytes:
        """Return the bytes of a file that only process 0 needs to have."""
        if self.count == 1:
            return path.read_bytes()
        return self._bytes_from_first(path.read_bytes() if self.is_first else b"")

    def copy_from_first(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrite ``tensors`` with their values in process 0."""
        if self.count == 1:
            return
        for tensor in tensors:
            with self._awaiting():
                dist.broadcast(tensor.data, 0)

    @contextlib.contextmanager
    def first_on_each_machine(self) -> Iterator[None]:
        """Run the block in one process of each machine, then in the others: they find what it left on the disk."""
        if self.local_rank > 0:
            self.wait()
        yield
        if self.local_rank == 0:
            self.wait()

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Run the block in one process of each machine after the other: together they would not fit its memory."""
        most = torch.tensor([self.local_count])
        if self.count > 1:
            with self._awaiting():
                dist.all_reduce(most, dist.ReduceOp.MAX)
        for _ in range(self.local_rank):
            self.wait()
        yield
        for _ in range(self.local_rank, int(most)):
            self.wait()

    def mesh(self, device: torch.device) -> DeviceMesh:
        """Return the processes as torch's fully_shard wants them; a gathering has the time limit of a step."""
        return DeviceMesh.from_group(self._steps, device.type)

    def check_same(self, found: dict[str, str]) -> None:
        """Compare by name what this process found with what process 0 did.

        Raises:
            TrainingError: something is another; names it and the machine.
        """
        of_first = self.from_first(lambda: found)
        if differing := [name for name in found if found[name] != of_first[name]]:
            raise TrainingError(
                f"Process {self.rank} on {socket.gethostname()} has other {' and '.join(differing)} than process 0. "
                "All machines of a run need the same files, settings and versions: copy them, and start again."
            )

    def _bytes_from_first(self, content: bytes) -> bytes:
        size = torch.tensor([len(content)])
        with self._awaiting():
            dist.broadcast(size, 0)
            buffer = bytearray(content) if self.is_first else bytearray(int(size))
            if buffer:  # torch makes no tensor of nothing
                dist.broadcast(torch.frombuffer(buffer, dtype=torch.uint8), 0)
        return bytes(buffer)

    @contextlib.contextmanager
    def _awaiting(self) -> Iterator[None]:
        """Turn the failure of the collective call inside into a LostProcessError."""
        try:
            yield
        except RuntimeError as error:  # gloo raises no other, and torch's own are its children
            raise self.lost(error) from error

    def lost(self, error: RuntimeError) -> LostProcessError:
        """Return what to raise when a call that all processes take part in has failed with ``error``."""
        return LostProcessError(
            f"Process {self.rank} of {self.count} (numbered from 0) on {socket.gethostname()} has lost another: it has "
            f"ended, or has not answered for {self.lost_after_seconds:,.0f} s (run.lost_after_seconds). The last "
            "checkpoint is kept: start the run again, with as many processes as you like; "
            f"torchrun --max-restarts does so by itself. ({first_line(error)})"
        )


ALONE = Team()


@contextlib.contextmanager
def joined(device: str, lost_after_seconds: float) -> Iterator[Team]:
    """Join the processes that torchrun has started with this one, and leave them at the end; alone without torchrun.

    With CUDA each process of a machine takes one GPU, by its number there, and gradients go through NCCL; else
    through gloo.

    Raises:
        SettingsError: ``device`` cannot be used by several processes, or there are fewer GPUs than processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    rank, count, local_rank, local_count = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    uses_gpus = _take_gpu(device, local_rank, local_count)
    backend = "cpu:gloo,cuda:nccl" if uses_gpus else "gloo"
    team = Team(rank, count, local_rank, local_count, lost_after_seconds)
    with team._awaiting():
        store, _, _ = next(dist.rendezvous("env://", timeout=_PREPARATION))
        # torchrun's store outlives its workers and still has the addresses of dead ones. Machines count their restarts
        # apart, so only one alone can tell its starts from each other by that.
        start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if local_count == count else "0"
        store = dist.PrefixStore(f"start-{start}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_PREPARATION)
    steps = dist.new_group(backend=backend, timeout=timedelta(seconds=lost_after_seconds))
    team = Team(rank, count, local_rank, local_count, lost_after_seconds, steps)
    try:
        yield team
    except RuntimeError as error:  # from inside the model, where a sharded base is gathered
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise team.lost(error) from error
        raise
    # Not after an error: NCCL would wait for those that are lost, and the process is about to end.
    dist.destroy_process_group()


def _take_gpu(device: str, local_rank: int, local_count: int) -> bool:
    """Make GPU number ``local_rank`` this process's own and return True, or False for a CPU."""
    if device == "cpu":
        return False
    if device not in ("auto", "cuda") or (device == "auto" and torch.backends.mps.is_available()):
        raise SettingsError(
            f"base.device is {device}, and {local_count} processes of this machine would share it. With several "
            "processes it can be cpu, or cuda for one GPU each."
        )
    if not torch.cuda.is_available():
        return False  # for cuda, choose_device has the error text
    if local_count > torch.cuda.device_count():
        raise SettingsError(
            f"There are {local_count} processes on this machine and {torch.cuda.device_count()} GPUs; each needs one. "
            f"Start {torch.cuda.device_count()} processes, or use base.device=cpu."
        )
    torch.cuda.set_device(local_rank)
    return True


def cost_of(pack: Pack, cost: PackCost) -> int:
    """Return what a forward pass over ``pack`` costs, in tokens that see nothing."""
    starts = np.array([segment.start for segment in pack.segments])
    begin = pack.position_ids[starts]
    lengths = np.array([segment.stop - segment.start for segment in pack.segments])
    num_learnt = np.zeros_like(lengths)
    num_learnt[0] = len(pack.targets)
    return int(cost.in_tokens(begin, begin + lengths, num_learnt).sum())


def divide(costs: Sequence[int], count: int) -> list[list[int]]:
    """Return for each of ``count`` processes the places of ``costs`` that it takes, in order.

    The dearest first, each to the process that has the least so far: at most 4/3 - 1/(3 count) times the best there
    is (Graham 1969, "Bounds on multiprocessing timing anomalies", theorem 2). 7, 6, 3, 3 for two: [7, 3] and [6, 3].
    """
    taken: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, process) for process in range(count)]
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        load, process = heapq.heappop(loads)
        taken[process].append(place)
        heapq.heappush(loads, (load + costs[place], process))
    return [sorted(places) for places in taken]
