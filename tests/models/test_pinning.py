"""Memory of the host for a GPU, without one: a driver is played."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from xditd.models import pinning
from xditd.models.pinning import LARGE_PAGE, Pinned

DEVICE = torch.device("cpu")
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class Driver:
    """Pins everything."""

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.registered[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(pinning, "cudart", lambda: driver)
    return driver


def test_all_of_it_can_be_written_and_is_pinned_until_it_is_let_go(driver: Driver) -> None:
    host = Pinned(3 * LARGE_PAGE + 5, DEVICE)
    host.memory.copy_(torch.arange(host.memory.numel()) % 251)
    assert host.memory[-1] == (3 * LARGE_PAGE + 4) % 251
    assert driver.registered == {host.memory.data_ptr(): 3 * LARGE_PAGE + 5}
    # By where its storage begins torch tells that a tensor is pinned.
    assert host.memory.untyped_storage().data_ptr() == host.memory.data_ptr()
    host.let_go()
    host.let_go()
    assert driver.registered == {}


@pytest.mark.skipif(
    not ENABLED.exists() or "[never]" in ENABLED.read_text(), reason="this kernel has no large pages to give"
)
def test_it_lies_in_large_pages(driver: Driver) -> None:
    host = Pinned(4 * LARGE_PAGE, DEVICE)
    host.memory.fill_(1)
    assert large_pages(host.memory.data_ptr()) >= 3 * LARGE_PAGE


def test_no_bytes_are_not_pinned(driver: Driver) -> None:
    """Weights of which all are away sleep as well, and a driver refuses to pin nothing."""
    host = Pinned(0, DEVICE)
    assert host.memory.numel() == 0
    assert driver.registered == {}
    host.let_go()


def large_pages(address: int) -> int:
    """Bytes of the mapping around an address that are in large pages."""
    within = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            within = begin <= address < end
        elif within and first == "AnonHugePages:":
            return int(line.split()[1]) * 1024
    raise AssertionError(f"Nothing is mapped at {address:#x}.")
