"""A daemon that is told an attention kernel: refused at its start where that cannot be had; one line where a faster one is not there."""

from __future__ import annotations

import logging

import pytest

from xditd.daemon.devices import Device, check_attention
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
