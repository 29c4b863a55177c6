"""`PeakMemory` measures what a block of code holds at most, or nothing where it cannot."""

import sys

import pytest
import torch

from fused_ignore_ce.tools.measure import PeakMemory


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is measured on Linux only")
@pytest.mark.parametrize("mib", [24, 96], ids=["heap", "mapped"])  # below and above what glibc may keep
def test_peak_memory_counts_reused_memory_too(mib):
    pins = []  # what is freed below them is not at the heap's end, which glibc returns on its own
    for _ in range(8):
        with PeakMemory(torch.device("cpu")) as peak:
            both = [torch.ones(mib << 18), torch.ones(mib << 18)]
            pins.append(torch.ones(1 << 16))
            del both
    assert peak.bytes == pytest.approx(2 * mib << 20, abs=8 << 20)


def test_peak_memory_is_none_on_devices_it_does_not_know():
    with PeakMemory(torch.device("meta")) as peak:
        torch.ones(9, device="meta")
    assert peak.bytes is None
