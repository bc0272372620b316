"""What is free is the least of what limits a process; a peak is seen; an allocator's refusal is known."""

import subprocess
import sys

import psutil
import pytest
import torch

from lorasmith.model import memory
from lorasmith.model.memory import free_bytes, is_out_of_memory, measure_peak

CPU = torch.device("cpu")
MIB = 2**20


def test_a_peak_is_seen_after_its_memory_is_freed():
    with measure_peak(CPU) as peak:
        block = torch.ones(100 * MIB // 4)
        del block
    assert 95 * MIB < peak.taken < 130 * MIB
    with measure_peak(CPU) as small:
        torch.ones(10)
    assert small.taken < 20 * MIB, "the mark of the first block must not stay"


def test_where_the_kernel_keeps_no_mark_memory_is_sampled(monkeypatch):
    monkeypatch.setattr(memory, "_reset_high_water_mark", lambda: False)
    with measure_peak(CPU) as peak:
        block = torch.ones(100 * MIB // 4)
        del block
    assert "sampled" in peak.how
    assert peak.during >= peak.before


def write_group(folder, **files):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_the_tightest_cgroup_above_a_process_counts(tmp_path):
    proc, root = tmp_path / "cgroup", tmp_path / "fs"
    proc.write_text("0::/batch/job\n")
    write_group(root / "batch", memory__max=8_000, memory__current=7_000, memory__stat="inactive_file 500")
    write_group(root / "batch" / "job", memory__max="max", memory__current=10, memory__stat="inactive_file 0")
    assert memory._cgroup_room(proc, root) == [1_500]


def test_a_cgroup_of_the_first_version_counts_too(tmp_path):
    proc, root = tmp_path / "cgroup", tmp_path / "fs"
    proc.write_text("4:memory:/job\n3:cpuset:/\n")
    write_group(root / "memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=1)
    write_group(
        root / "memory" / "job",
        memory__limit_in_bytes=9_000,
        memory__usage_in_bytes=4_000,
        memory__stat="total_inactive_file 1000\ncache 5",
    )
    assert memory._cgroup_room(proc, root) == [6_000]


def test_no_cgroups_are_no_limit(tmp_path):
    assert memory._cgroup_room(tmp_path / "none", tmp_path) == []


def test_what_is_free_is_never_more_than_the_system_has():
    assert 0 < free_bytes(CPU) <= psutil.virtual_memory().total


@pytest.mark.skipif(sys.platform != "linux", reason="ulimit -v is enforced on Linux only")
def test_a_limit_of_addresses_is_seen_and_its_refusal_is_known():
    code = """
import resource, psutil, torch
from lorasmith.model.memory import free_bytes, is_out_of_memory
limit = psutil.Process().memory_info().vms + 200 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
free = free_bytes(torch.device("cpu"))
assert 100 * 2**20 < free <= 200 * 2**20, free
try:
    torch.empty(2**30)
except RuntimeError as error:
    print(is_out_of_memory(error))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", done.stderr


def test_refusals_are_told_from_other_errors():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory"))
