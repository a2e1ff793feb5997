"""SDXL on a device: ComfyUI's inputs in, the network's raw output out. Knows no ranks and no sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from xditd.catalog.layouts.sdxl import pieces
from xditd.models.sdxl.config import config
from xditd.models.tokens import Tokens


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What SDXL is conditioned on, on the device and in the compute dtype."""

    context: torch.Tensor  # [1 or B, n, context_width]
    vector: torch.Tensor  # [1 or B, vector_width]


class SDXL:
    """An SDXL UNet.

    Attributes:
        backbone: diffusers' module.
        call: what runs it: the module itself, as it runs on one device.
    """

    heads = 1
    tokens = Tokens(image={}, attention=())  # none: it cannot be split

    pieces = staticmethod(pieces)

    @staticmethod
    def empty(facts: Mapping[str, int]) -> UNet2DConditionModel:
        """The module, as the facts have it."""
        return UNet2DConditionModel(**config(facts))

    def __init__(
        self,
        backbone: UNet2DConditionModel,
        facts: Mapping[str, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.backbone = backbone
        self.device = device
        self.dtype = dtype
        self.call: Callable[..., torch.Tensor] = partial(self.run, backbone)

    def condition(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, float]) -> Conditioning:
        """A conditioning from the tensors `context` and `vector`."""
        return Conditioning(tensors["context"].to(self.dtype), tensors["vector"].to(self.dtype))

    def predict(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        """The noise in x, or v.

        Args:
            x: [B, C, H, W] on the device, any float dtype, any height and width.
            t: index of a timestep, float32 [B].
            conditioning: of batch 1 or B.

        Returns:
            [B, C, H, W] in the compute dtype.
        """
        batch = x.shape[0]
        return self.call(
            sample=x.to(self.dtype),
            timestep=t,
            encoder_hidden_states=conditioning.context.expand(batch, -1, -1),
            class_labels=conditioning.vector.expand(batch, -1),
        )

    def run(self, module: Callable[..., Any], **keywords: Any) -> torch.Tensor:
        """The module on a whole latent."""
        output: torch.Tensor = module(**keywords, return_dict=False)[0]
        return output
