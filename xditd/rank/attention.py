"""Which attention kernel a device and a dtype get. A table; it knows no model and imports neither xfuser nor diffusers.

Ring attention merges partial results by their log-sum-exp, so under xfuser a kernel must return it: all of these do. cuDNN's is
the fastest of torch's own on Ampere and later (notes: 184 against 198 ms a step of FLUX.1 on one H200), for 16-bit dtypes only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from xditd.protocol.errors import Code, XditError
from xditd.protocol.kernels import KERNELS, installed, unfit

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Attention:
    """One kernel.

    Attributes:
        name: what status shows.
        diffusers: diffusers' name of it, for a model in one process; "" where it has none that needs no hub.
        xfuser: xfuser's name of it, for a model in a world.
        half: for 16-bit dtypes only.
    """

    name: str
    diffusers: str
    xfuser: str
    half: bool = True


CPU = Attention("flash_cpu", "native", "SDPA_FLASH", half=False)
FLASH_4 = Attention("flash_4", "", "FLASH_4")
FLASH_3 = Attention("flash_3", "_flash_3", "FLASH_3")
CUDNN = Attention("cudnn", "_native_cudnn", "CUDNN")
FLASH = Attention("flash", "flash", "FLASH")
EFFICIENT = Attention("efficient", "native", "SDPA_EFFICIENT", half=False)

TABLE = {kernel.name: kernel for kernel in (FLASH_4, FLASH_3, CUDNN, FLASH, EFFICIENT)}

TORCHS = "sdpa"
"""The name of what torch chooses itself, call by call."""


def obeyed(backbone: torch.nn.Module) -> bool:
    """Whether a module of diffusers computes with the kernel that it is told. Its older classes ask torch."""
    processors = (getattr(module, "processor", None) for module in backbone.modules())
    return any(hasattr(processor, "_attention_backend") for processor in processors)


def heeded(kernel: Attention, backbone: torch.nn.Module, wanted: str) -> str:
    """The name of what a module of diffusers computes with that was told a kernel.

    Raises:
        XditError: `load_failed` where that one was wanted, and the module asks torch.
    """
    if obeyed(backbone):
        return kernel.name
    if wanted:
        raise _refused(wanted, f"a {type(backbone).__name__} of diffusers leaves to torch in one process")
    return TORCHS


def choose(device: torch.device, dtype: torch.dtype, wanted: str = "", in_world: bool = False) -> Attention:
    """The kernel for a device and a compute dtype: the best that there is, or the one that is wanted.

    Args:
        wanted: one of `KERNELS`; "" leaves the choice.
        in_world: xfuser computes, and not diffusers.

    Raises:
        XditError: `load_failed` where the wanted one cannot be had.
    """
    if device.type == "cpu":
        if wanted:
            raise _refused(wanted, "runs on GPUs, but this rank computes on the CPU")
        return CPU
    return pick(torch.cuda.get_device_capability(device), dtype, wanted, in_world, installed)


def pick(
    capability: tuple[int, int],
    dtype: torch.dtype,
    wanted: str,
    in_world: bool,
    there: Callable[[str], bool],
) -> Attention:
    """As `choose`, for a GPU of this compute capability. Pure.

    Args:
        there: whether a kernel's package is installed.
    """
    for name in [wanted] if wanted else KERNELS:
        kernel = TABLE[name]
        problem = _unfit(kernel, capability, dtype, in_world)
        if not problem and not there(name):
            problem = "is not installed"
        if not problem:
            return kernel
        if wanted:
            raise _refused(wanted, problem)
    raise AssertionError("efficient is for every GPU")


def _unfit(kernel: Attention, capability: tuple[int, int], dtype: torch.dtype, in_world: bool) -> str:
    """Why it cannot compute this; "" where it can."""
    if problem := unfit(kernel.name, capability):
        return problem
    if kernel.half and dtype not in HALF:
        return f"computes in bfloat16 and float16, not in {str(dtype).removeprefix('torch.')}"
    if not in_world and not kernel.diffusers:
        return "is for several ranks that share a sequence (ulysses, ring): in one process diffusers has it from a hub alone"
    return ""


def _refused(wanted: str, problem: str) -> XditError:
    return XditError(
        Code.LOAD_FAILED,
        f"compute.attention asks for {wanted}, which {problem}; leave the key out, and the best that there is will be taken.",
    )
