"""What ComfyUI calls each family's parts, and what of its calls the daemon takes. A new family is a module here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelInfo

from . import flux, hunyuandit, pixart, sd3, sdxl


class Family(Protocol):
    """A family's module."""

    INPUTS: frozenset[str]
    """Names of a diffusion model call's inputs that it takes, besides x, timestep, context and what all have."""

    CLIP: str
    """The type of its CLIP, as ComfyUI's CLIP loaders call it."""

    ENCODERS: tuple[str, ...]
    """The text encoders that a checkpoint of it may have."""

    MULTIPLIER: float | None
    """A flow model's timestep is sigma times this; None: it is no flow model."""

    BARE: bool
    """Whether ComfyUI calls such a model without a text too, in whose place an empty prompt stands then."""

    patch_size: int

    def comfy_config(self, info: ModelInfo) -> Any:
        """ComfyUI's configuration of such a model, one that makes a model without its network."""

    def conditioning(
        self, inputs: Mapping[str, Any], info: ModelInfo
    ) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """The tensors and values that the daemon takes, from one conditioning's share of a call's inputs."""


FAMILIES: dict[str, Family] = {
    "flux": flux, "sd3": sd3, "pixart": pixart, "hunyuandit": hunyuandit, "sdxl": sdxl,
}  # fmt: skip


def family(info: ModelInfo) -> Family:
    """The module of a model's family.

    Raises:
        XditError: `not_built` for one that these nodes do not know.
    """
    found = FAMILIES.get(info.family)
    if found is None:
        raise XditError(
            Code.NOT_BUILT,
            f"{info.name} is a {info.family}, which these nodes do not know; they know {', '.join(FAMILIES)}.",
        )
    return found
