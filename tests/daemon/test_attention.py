"""A daemon that is told an attention kernel: refused at its start where that cannot be had; one line where a faster one is not there."""

from __future__ import annotations

import logging
import sys

import pytest

from tests.daemon.fake_nvml import FakeNvml, Gpu
from xditd.daemon.devices import Device, check_attention, own
from xditd.protocol import kernels
from xditd.protocol.errors import Code, XditError

GPU, CPU = Device("cuda:0", "NVIDIA H100"), Device("cpu:0", "CPU")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without any flash-attn."""
    monkeypatch.setattr(
        kernels, "installed", lambda kernel: kernel in kernels.KERNELS and kernel not in kernels.PACKAGES
    )


@pytest.mark.parametrize(
    ("device", "kernel", "why"),
    [(GPU, "flash_3", "which is not installed here"), (CPU, "cudnn", "the daemon has CPU ranks")],
)
def test_what_cannot_be_had_is_refused(bare: None, device: Device, kernel: str, why: str) -> None:
    with pytest.raises(XditError, match=why) as refused:
        check_attention(kernel, [device])
    assert refused.value.code == Code.BAD_CONFIG


def test_gpus_without_flash_attn_are_told_of_in_one_line(
    bare: None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check_attention("", [CPU])
        assert not caplog.messages
        check_attention("cudnn", [GPU, GPU])
    (line,) = caplog.messages
    assert line.startswith("⚠️ flash-attn is not installed")


def test_a_kernel_that_is_not_for_one_of_the_gpus_is_refused_before_a_rank_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cards = (Gpu(0), Gpu(1, capability=(8, 9)), Gpu(2, capability=None))
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(*cards))
    monkeypatch.setattr(kernels, "installed", kernels.KERNELS.__contains__)
    hopper, ada, silent = own("cuda", (), 1)
    assert (hopper.capability, ada.capability, silent.capability) == ((9, 0), (8, 9), None)
    check_attention("flash_3", [hopper, silent])
    check_attention("flash", [hopper, ada, silent])
    with pytest.raises(XditError, match=r"flash_3.*compute capability 8\.9, as cuda:1 is") as refused:
        check_attention("flash_3", [hopper, ada, silent])
    assert refused.value.code == Code.BAD_CONFIG
