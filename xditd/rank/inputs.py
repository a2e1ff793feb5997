"""What the runs of a transformer were given: conditionings, LoRAs, what a sampling begins from. Knows no loop.

It is kept until `forget`; nothing of a run outlives it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from xditd.models.families import Transformer
from xditd.protocol import orders
from xditd.protocol.errors import Code, XditError
from xditd.rank.places import Frames
from xditd.rank.transfer import Transfer


class Start(NamedTuple):
    """What a sampling begins from.

    Attributes:
        conditionings: of a step's calls: the positive one, and where cfg is not 1 the negative one.
        noise: float32, on the device.
        latent: as noise; None is zeros.
    """

    conditionings: list[Any]
    noise: torch.Tensor
    latent: torch.Tensor | None


class Inputs:
    """Those of all runs under way.

    Args:
        network: that makes conditionings of tensors, and holds LoRAs.
        transfer: of this rank's tensors.
    """

    def __init__(self, network: Transformer, transfer: Transfer) -> None:
        self._network = network
        self._transfer = transfer
        self._conditionings: dict[int, dict[str, Any]] = {}
        self._loras: dict[int, tuple[orders.Merge, ...]] = {}

    def set_loras(self, order: orders.SetLoras, frames: Frames) -> None:
        self._loras[order.run] = order.loras
        self.hold_loras(order.run)

    def set_conditioning(self, order: orders.SetConditioning, frames: Frames) -> None:
        tensors = {
            name: self._transfer.receive(tensor, frames, keep=True) for name, tensor in order.tensors.items()
        }
        conditioning = self._network.condition(tensors, order.values)
        self._conditionings.setdefault(order.run, {})[order.key] = conditioning

    def hold_loras(self, run: int) -> None:
        """Before every turn: the weights are those of its run. The daemon sees to it that they seldom have to change."""
        self._network.loras.hold(self._loras.get(run, ()))

    def conditioning(self, run: int, key: str) -> Any:
        """
        Raises:
            XditError: `no_such_conditioning`.
        """
        conditioning = self._conditionings.get(run, {}).get(key)
        if conditioning is None:
            raise XditError(
                Code.NO_SUCH_CONDITIONING, f"Run {run} was given no conditioning {key!r}; put it first."
            )
        return conditioning

    def start(self, order: orders.BeginSample, frames: Frames) -> Start:
        """
        Raises:
            XditError: `no_such_conditioning`.
        """
        conditionings = [self.conditioning(order.run, order.conditioning)]
        if order.negative is not None and not math.isclose(order.cfg, 1.0):
            conditionings.append(self.conditioning(order.run, order.negative))
        noise = self._transfer.receive(order.noise, frames, keep=True).float()
        latent = None
        if order.latent is not None:
            latent = self._transfer.receive(order.latent, frames, keep=True).float()
        return Start(conditionings, noise, latent)

    def forget(self, run: int) -> None:
        self._loras.pop(run, None)
        self._conditionings.pop(run, None)
