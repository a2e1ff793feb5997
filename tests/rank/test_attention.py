"""Which attention kernel a rank gets: the best that is there for its GPU and dtype, or the one that it is told, or a refusal."""

from __future__ import annotations

import sys

import pytest
import torch

from xditd.protocol.errors import Code, XditError
from xditd.protocol.kernels import KERNELS, installed, lacking
from xditd.rank.attention import TABLE, choose, pick

HOPPER, AMPERE, BLACKWELL, TURING = (9, 0), (8, 0), (10, 0), (7, 5)
TORCHS_OWN = {"cudnn", "efficient"}
ALL = set(KERNELS)
HALF = torch.bfloat16


@pytest.mark.parametrize(
    ("capability", "dtype", "in_world", "there", "name"),
    [
        (HOPPER, HALF, False, TORCHS_OWN, "cudnn"),
        (HOPPER, HALF, False, ALL, "flash_3"),
        (HOPPER, HALF, True, ALL, "flash_4"),
        (BLACKWELL, HALF, True, ALL, "flash_4"),
        (BLACKWELL, HALF, False, ALL, "cudnn"),
        (AMPERE, HALF, True, ALL, "cudnn"),
        (AMPERE, HALF, True, {"flash", "efficient"}, "flash"),
        (TURING, torch.float16, True, ALL, "efficient"),
        (HOPPER, torch.float32, True, ALL, "efficient"),
    ],
)
def test_the_best_that_is_there_is_taken(capability, dtype, in_world, there, name):
    assert pick(capability, dtype, "", in_world, there.__contains__).name == name


@pytest.mark.parametrize("wanted", ["flash", "efficient", "cudnn"])
def test_the_one_that_is_wanted_is_taken_though_another_is_better(wanted):
    assert pick(HOPPER, HALF, wanted, True, ALL.__contains__).name == wanted


@pytest.mark.parametrize(
    ("wanted", "capability", "dtype", "in_world", "there", "why"),
    [
        ("flash_3", HOPPER, HALF, True, TORCHS_OWN, "is not installed"),
        ("flash_3", AMPERE, HALF, True, ALL, "compute capability 8.0"),
        ("cudnn", HOPPER, torch.float32, True, ALL, "not in float32"),
        ("flash_4", HOPPER, HALF, False, ALL, "several ranks that share a sequence"),
    ],
)
def test_one_that_cannot_be_had_is_refused_with_its_reason(wanted, capability, dtype, in_world, there, why):
    with pytest.raises(XditError, match=why) as refused:
        pick(capability, dtype, wanted, in_world, there.__contains__)
    assert refused.value.code == Code.LOAD_FAILED


def test_a_cpu_has_its_own_and_no_other():
    assert choose(torch.device("cpu"), torch.float32).name == "flash_cpu"
    with pytest.raises(XditError, match="runs on GPUs"):
        choose(torch.device("cpu"), torch.float32, "flash")


def test_a_module_that_asks_torch_says_so_and_refuses_another():
    from xditd.rank.attention import CUDNN, heeded

    assert heeded(CUDNN, torch.nn.Linear(1, 1), "") == "sdpa"
    with pytest.raises(XditError, match="a Linear of diffusers leaves to torch"):
        heeded(CUDNN, torch.nn.Linear(1, 1), "cudnn")


def test_the_libraries_know_their_names_of_every_kernel():
    from diffusers.models.attention_dispatch import AttentionBackendName

    from xditd.rank import xfuser_seam

    xfuser_seam.enter(torch.device("cpu"))
    from xfuser.core.distributed.attention_backend import AttentionBackendType

    assert set(TABLE) == set(KERNELS)
    for kernel in TABLE.values():
        assert kernel.xfuser in AttentionBackendType.__members__
        assert not kernel.diffusers or AttentionBackendName(kernel.diffusers)


def test_packages_are_found_without_being_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    before = {name: installed(name) for name in ("flash", "flash_3", "flash_4")}
    if any(before.values()):
        pytest.skip("flash-attn is installed here")
    assert "is not installed here" in lacking("flash_3")
    assert lacking("cudnn") == lacking("") == ""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    assert (installed("flash_4"), installed("flash")) == (True, False)
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "flash_attn_interface.py").write_text("raise RuntimeError('imported')")
    assert all(map(installed, ("flash", "flash_3", "flash_4")))
    assert "flash_attn" not in sys.modules
