"""Two machines of one run, each a network namespace with nothing but a cable to the other, and no common disk.

    unshare --user --map-root-user --net python -m tests.training.two_machines FOLDER WORD...

Trains until step 5, cuts the cable, waits for both to end, mends it, and trains to the end; prints what each said.
"""

import ctypes
import json
import multiprocessing
import os
import subprocess
import sys
from multiprocessing.connection import Connection

import lorasmith.training.job  # noqa: F401 (imported once, and not in every machine)

from .team_member import train_and_tell

_CLONE_NEWNET = 0x40000000


def be_machine(rank: int, words: list[str], folder: str, sender: Connection, cable: Connection) -> None:
    """Train as the only process of machine ``rank``, behind ``cable``."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "no network namespace")
    sender.send("ready")
    cable.recv()
    for line in ("link set lo up", f"addr add 10.7.0.{rank + 1}/24 dev m{rank}", f"link set m{rank} up"):
        ip(line)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "10.7.0.1",
        "MASTER_PORT": "29500",
        "GLOO_SOCKET_IFNAME": f"m{rank}",
    }
    train_and_tell(words, f"{folder}/disk-{rank}/run", sender)


def ip(line: str, *inside: str) -> None:
    """Run ip(8), ``inside`` another machine if its words say so."""
    subprocess.run([*inside, "ip", *line.split()], check=True)


def train_on_both(words: list[str], folder: str, cut_after: int | None) -> list[list]:
    """Return what each machine said, from its first step on; the cable is cut after step ``cut_after``."""
    context = multiprocessing.get_context("fork")
    ip("link add m0 type veth peer name m1")
    machines, receivers = [], []
    for rank in range(2):
        receiver, sender = context.Pipe(duplex=False)
        end, cable = context.Pipe(duplex=False)
        machine = context.Process(target=be_machine, args=(rank, words, folder, sender, end))
        machine.start()
        sender.close()
        assert receiver.recv() == "ready"
        ip(f"link set m{rank} netns {machine.pid}")
        machines.append((machine, cable))
        receivers.append(receiver)
    for _, cable in machines:
        cable.send("plugged in")
    said: list[list] = [[], []]
    for rank in (1, 0):
        while not (said[rank] and isinstance(said[rank][-1], str)):
            said[rank].append(receivers[rank].recv())
            if rank == 1 and cut_after is not None and said[1][-1][0] == cut_after:
                ip("link set m1 down", "nsenter", f"--net=/proc/{machines[1][0].pid}/ns/net")
    for machine, _ in machines:
        machine.join(60)
    return said


if __name__ == "__main__":
    folder, *words = sys.argv[1:]
    print(json.dumps([train_on_both(words, folder, cut_after) for cut_after in (5, None)]))
