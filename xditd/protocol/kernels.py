"""Attention kernels, by the names that configuration and status have for them, and whether their package is there. stdlib."""

from __future__ import annotations

import importlib.util
from pathlib import Path

KERNELS = ("flash_4", "flash_3", "cudnn", "flash", "efficient")
"""Those of a GPU, best first: flash-attn 4 and 3, cuDNN's, flash-attn 2, torch's memory-efficient one."""

PACKAGES = {
    "flash_4": ("flash_attn", "cute", "flash-attn-4"),
    "flash_3": ("flash_attn_interface", "", "flash-attn 3, from the folder hopper of its repository"),
    "flash": ("flash_attn", "", "flash-attn: pip install 'xditd[flash]'"),
}
"""Of those that torch does not bring: the module, a folder that must be in it, and what is to be installed."""

GPUS = {
    "flash_4": ((9, 0), (12, 0)),
    "flash_3": ((9, 0), (10, 0)),
    "cudnn": ((8, 0), (99, 0)),
    "flash": ((8, 0), (99, 0)),
}
"""Of those that are not for every GPU: its compute capability, from, and below."""


def unfit(kernel: str, capability: tuple[int, int]) -> str:
    """Why it is not for GPUs of a compute capability; "" where it is."""
    since, before = GPUS.get(kernel, ((0, 0), (99, 0)))
    if since <= capability < before:
        return ""
    return f"is not for GPUs of compute capability {capability[0]}.{capability[1]}"


def installed(kernel: str) -> bool:
    """Whether its package is there. Nothing is imported: flash-attn would bring torch along."""
    if kernel not in PACKAGES:
        return kernel in KERNELS
    module, folder, _ = PACKAGES[kernel]
    try:
        spec = importlib.util.find_spec(module)
    except ValueError:  # a module that somebody has put into sys.modules by hand
        return False
    if spec is None:
        return False
    places = [Path(place) for place in spec.submodule_search_locations or ()]
    if not folder:  # flash-attn 4 installs a flash_attn with nothing but its folder in it
        return not places or any((place / "__init__.py").exists() for place in places)
    return any((place / folder).is_dir() for place in places)


def lacking(kernel: str) -> str:
    """Why a kernel that is asked for cannot be had, as a sentence; "" where its package is there, or it is none."""
    if not kernel or installed(kernel):
        return ""
    return f"compute.attention asks for {kernel}, which is not installed here: install {PACKAGES[kernel][2]}, or leave the key out."
