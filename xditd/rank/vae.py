"""A VAE's orders: decode and encode. Every rank of a world computes the same, and rank 0 answers."""

from __future__ import annotations

from functools import partial

from xditd.models.vae.network import Autoencoder
from xditd.protocol import orders
from xditd.rank.answers import Answer, Handlers
from xditd.rank.batches import singly
from xditd.rank.device import Device
from xditd.rank.places import Frames
from xditd.rank.rest import resting, turning
from xditd.rank.transfer import Transfer


class Vae:
    """The worker of a VAE. It keeps nothing between turns.

    Args:
        network: on the device.
        transfer: of this rank's tensors.
        device: this rank's.
        attention: the kernel's name.
    """

    def __init__(self, network: Autoencoder, transfer: Transfer, device: Device, attention: str) -> None:
        self.attention = attention
        self.weights, self.host_weights = network.weights.counted(network.backbone)
        self.device_memory = device.memory
        self.usable = device.usable
        self._network = network
        self._transfer = transfer
        handlers: Handlers = {
            orders.TurnDecode: self.decode,
            orders.TurnEncode: self.encode,
            orders.ForgetRun: lambda order, frames: None,
            orders.DropSegments: lambda order, frames: transfer.drop(order.segments),
            **resting(network, device),
        }
        self.handlers = turning(handlers, network)

    def decode(self, order: orders.TurnDecode, frames: Frames) -> Answer:
        decode = partial(self._network.decode, clamp=order.clamp)
        latent = self._transfer.receive(order.latent, frames)
        image = singly(decode, latent) if order.singly else decode(latent)
        return Answer(*self._transfer.deliver([(image, order.out, "float32")], frames))

    def encode(self, order: orders.TurnEncode, frames: Frames) -> Answer:
        image = self._transfer.receive(order.image, frames)
        latent = singly(self._network.encode, image) if order.singly else self._network.encode(image)
        return Answer(*self._transfer.deliver([(latent, order.out, "float32")], frames))
