"""The device choice: measured where it matters, wishes honoured or refused, the reason in words."""

import pytest
import torch

from lorasmith.errors import SettingsError
from lorasmith.model import device
from lorasmith.model.device import CpuSpeeds, choose_device, measure_cpu


@pytest.mark.parametrize(
    ("speeds", "dtype", "reason"),
    [
        (CpuSpeeds(100, 300), torch.bfloat16, "bfloat16: 3.0x faster than float32 on this CPU"),
        (CpuSpeeds(100, 110), torch.float32, "bfloat16: hardly faster than float32 on this CPU, so float32"),
        (CpuSpeeds(100, 50), torch.float32, "bfloat16: 2.0x slower than float32 on this CPU, so float32"),
    ],
)
def test_bfloat16_must_be_clearly_faster(monkeypatch, speeds, dtype, reason):
    monkeypatch.setattr(device, "measure_cpu", lambda: speeds)
    choice = choose_device("cpu")
    assert (choice.device.type, choice.dtype, choice.reason) == ("cpu", dtype, reason)


def test_the_measurement_is_real_and_leaves_the_random_stream_alone():
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    measure_cpu.cache_clear()
    speeds = measure_cpu()
    assert torch.equal(torch.rand(2), expected)
    assert speeds.float32 > 0.1
    assert speeds.bfloat16 > 0.01
    assert measure_cpu() is speeds


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_wish_is_honoured_without_measuring(monkeypatch, name):
    monkeypatch.setattr(device, "measure_cpu", lambda: pytest.fail("measured"))
    choice = choose_device("cpu", name)
    assert choice.dtype is getattr(torch, name)
    assert choice.reason == f"cpu: {name}, as asked"


@pytest.mark.parametrize(
    ("wish", "text"),
    [
        (("tpu!", "auto"), "names no device"),
        (("meta", "auto"), "runs on cpu, cuda and mps"),
        (("cuda:99", "auto"), "sees \\d+ CUDA devices"),
        (("cpu", "int8"), "can be auto, float32, bfloat16, float16"),
    ],
)
def test_an_impossible_wish_is_refused(wish, text):
    with pytest.raises(SettingsError, match=text):
        choose_device(*wish)


def test_cuda_without_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda where: "Old GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    choice = choose_device()
    assert (choice.dtype, choice.reason) == (torch.float32, "Old GPU: has no bfloat16, so float32")
    with pytest.raises(SettingsError, match="Old GPU cannot compute in it"):
        choose_device("cuda", "bfloat16")
