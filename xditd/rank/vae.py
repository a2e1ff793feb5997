"""A VAE's orders: decode and encode. The ranks of a world share each picture, and rank 0 answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from xditd.models.weights import Weights
from xditd.protocol import orders
from xditd.rank.answers import Answer, Handlers
from xditd.rank.batches import singly
from xditd.rank.device import Device
from xditd.rank.failures import let_go, out_of_memory
from xditd.rank.faults import Faults
from xditd.rank.places import Frames
from xditd.rank.rest import resting, turning
from xditd.rank.transfer import Transfer

TILE = 512
"""The side in pixels of tiles that nobody named: ComfyUI's own for pictures that do not fit."""


Compute = Callable[..., torch.Tensor]
"""Of a batch and `tile`."""


class Network(Protocol):
    """`models.vae.network.Autoencoder`, or a world's (`rank.spatial`)."""

    backbone: torch.nn.Module
    weights: Weights

    def decode(self, latent: torch.Tensor, clamp: bool = True, tile: int = 0) -> torch.Tensor: ...

    def encode(self, image: torch.Tensor, tile: int = 0) -> torch.Tensor: ...


class Vae:
    """The worker of a VAE. It keeps nothing between turns.

    Args:
        network: on the device.
        transfer: of this rank's tensors.
        device: this rank's.
        attention: the kernel's name.
        faults: that a test asked for.
    """

    def __init__(
        self, network: Network, transfer: Transfer, device: Device, attention: str, faults: Faults
    ) -> None:
        self.attention = attention
        self.weights, self.host_weights = network.weights.counted(network.backbone)
        self.device_memory = device.memory
        self.usable = device.usable
        self._network = network
        self._transfer = transfer
        self._device = device
        self._faults = faults
        handlers: Handlers = {
            orders.TurnDecode: self.decode,
            orders.TurnEncode: self.encode,
            orders.ForgetRun: lambda order, frames: None,
            orders.DropSegments: lambda order, frames: transfer.drop(order.segments),
            **resting(network, device),
        }
        self.handlers = turning(handlers, network)

    def decode(self, order: orders.TurnDecode, frames: Frames) -> Answer:
        compute = partial(self._network.decode, clamp=order.clamp)
        image, why = self._within_memory(order, compute, self._transfer.receive(order.latent, frames))
        return Answer(*self._transfer.deliver([(image, order.out, "float32")], frames), degraded=why)

    def encode(self, order: orders.TurnEncode, frames: Frames) -> Answer:
        given = self._transfer.receive(order.image, frames)
        latent, why = self._within_memory(order, self._network.encode, given)
        return Answer(*self._transfer.deliver([(latent, order.out, "float32")], frames), degraded=why)

    def _within_memory(
        self, order: orders.TurnDecode | orders.TurnEncode, compute: Compute, given: torch.Tensor
    ) -> tuple[torch.Tensor, str]:
        """As ordered; where memory runs out and the order allows it, in tiles, and why."""

        def computed(tile: int) -> torch.Tensor:
            of_batch = partial(compute, tile=tile)
            return singly(of_batch, given) if order.singly else of_batch(given)

        try:
            if not order.tile:
                self._faults.when_whole()
            return computed(order.tile), ""
        except Exception as error:
            if not (order.tiles and out_of_memory(error)):
                raise
            let_go(error)
        self._device.settle()
        return computed(TILE), (
            f"the device ran out of memory over the picture whole; it was computed in tiles of {TILE} pixels, which is "
            "approximate"
        )
