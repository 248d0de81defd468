"""The table of GPUs: found under the names that people write, wrong ones told in one line."""

from __future__ import annotations

import pytest

from llava.errors import UsageError
from llava.train.plan.devices import DEVICES, find_device


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("a100-80g", "A100-80G"),
        ("A100 80GB", "A100-80G"),
        ("NVIDIA A800", "A800"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("v100_32gb", "V100-32G"),
    ],
)
def test_names_as_people_write_them(written, name):
    assert find_device(written).name == name


def test_unknown_name():
    with pytest.raises(UsageError, match=r"--gpu A1000: not in the table of GPUs; known: A100-40G"):
        find_device("A1000")


def test_numbers_agree_with_each_other():
    """What data sheets say of these families; a slip of a digit would break one of them."""
    by_name = {device.name: device for device in DEVICES}
    assert len(by_name) == len(DEVICES)
    for device in DEVICES:
        assert find_device(device.name) is device
        assert 24 <= device.memory_gib <= 192
        assert 1.5 < device.tflops_16 / device.tflops_32 < 20
        assert device.peak(2) == device.tflops_16 * 1e12 and device.peak(4) < device.peak(2)
        assert device.has_bf16 == (device.name != "V100-32G")  # the only one before Ampere
    assert by_name["A800"].tflops_16 == by_name["A100-80G"].tflops_16  # slower links, same chip
    assert by_name["H200"].tflops_16 == by_name["H100"].tflops_16  # more memory, same chip
    assert by_name["H20"].tflops_16 < by_name["A100-40G"].tflops_16
