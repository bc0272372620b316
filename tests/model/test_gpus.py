"""GPUs are found by the names that people type, and a wrong name is answered with the near one."""

import pytest

from lorasmith.errors import SettingsError
from lorasmith.model.gpus import GPUS, find_gpu


@pytest.mark.parametrize(
    ("words", "name", "count"),
    [("a10g", "A10G", 1), ("H100:8", "H100", 8), ("rtx 4090", "RTX4090", 1), ("A100_80gb:2", "A100-80GB", 2)],
)
def test_names_are_found(words, name, count):
    assert find_gpu(words) == (GPUS[name], count)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("A100-80", "Did you mean A100-80GB?"),
        ("abacus", "It has T4, "),
        ("T4:x", "a number of GPUs"),
        ("T4:0", "T4:2"),
    ],
)
def test_a_wrong_name_says_the_right_ones(words, answer):
    with pytest.raises(SettingsError) as caught:
        find_gpu(words)
    assert answer in str(caught.value)


def test_old_gpus_compute_in_float32_by_default():
    assert GPUS["T4"].best_dtype == "float32"
    assert GPUS["T4"].peak_flops("float32") == 8.1e12
    assert GPUS["L4"].best_dtype == "bfloat16"
    assert GPUS["L4"].peak_flops("bfloat16") == 121e12
