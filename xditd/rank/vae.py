"""A VAE's orders: decode and encode. Every rank of a world computes the same, and rank 0 answers."""

from __future__ import annotations

from xditd.models.reading import held
from xditd.models.vae.network import Autoencoder
from xditd.protocol import orders
from xditd.rank.answers import Answer, Handlers
from xditd.rank.device import Device
from xditd.rank.places import Frames
from xditd.rank.rest import resting
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
        self.weights = held(network.backbone)
        self.device_memory = device.memory
        self.usable = device.usable
        self._network = network
        self._transfer = transfer
        self.handlers: Handlers = {
            orders.TurnDecode: self.decode,
            orders.TurnEncode: self.encode,
            orders.ForgetRun: lambda order, frames: None,
            orders.DropSegments: lambda order, frames: transfer.drop(order.segments),
            **resting(network, device),
        }

    def decode(self, order: orders.TurnDecode, frames: Frames) -> Answer:
        image = self._network.decode(self._transfer.receive(order.latent, frames), order.clamp)
        return Answer(*self._transfer.deliver([(image, order.out, "float32")], frames))

    def encode(self, order: orders.TurnEncode, frames: Frames) -> Answer:
        latent = self._network.encode(self._transfer.receive(order.image, frames))
        return Answer(*self._transfer.deliver([(latent, order.out, "float32")], frames))
