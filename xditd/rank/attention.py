"""Which attention kernel a device and a dtype get. A table; it knows no model and imports neither xfuser nor diffusers.

Ring attention merges partial results by their log-sum-exp, so under xfuser a kernel must return it. cuDNN's is the
fastest on Ampere and later (notes: 184 against 198 ms a step of FLUX.1 on one H200), for 16-bit dtypes only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Attention:
    """One kernel.

    Attributes:
        name: what status shows.
        diffusers: diffusers' name of it, for a model in one process.
        xfuser: xfuser's name of it, for a model in a world.
    """

    name: str
    diffusers: str
    xfuser: str


CPU = Attention("flash_cpu", "native", "SDPA_FLASH")
CUDNN = Attention("cudnn", "_native_cudnn", "CUDNN")
EFFICIENT = Attention("efficient", "native", "SDPA_EFFICIENT")

TORCHS = "sdpa"
"""The name of what torch chooses itself, call by call."""


def obeyed(backbone: torch.nn.Module) -> bool:
    """Whether a module of diffusers computes with the kernel that it is told. Its older classes ask torch."""
    processors = (getattr(module, "processor", None) for module in backbone.modules())
    return any(hasattr(processor, "_attention_backend") for processor in processors)


def choose(device: torch.device, dtype: torch.dtype) -> Attention:
    """The kernel for a device and a compute dtype."""
    if device.type == "cpu":
        return CPU
    if dtype in (torch.bfloat16, torch.float16) and torch.cuda.get_device_capability(device) >= (8, 0):
        return CUDNN
    return EFFICIENT
