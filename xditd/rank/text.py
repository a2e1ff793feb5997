"""A text encoder's orders. Every rank of a world computes the same, and rank 0 answers."""

from __future__ import annotations

from xditd.models.text import TextEncoder
from xditd.protocol import orders
from xditd.rank.answers import Answer, Handlers
from xditd.rank.device import Device
from xditd.rank.places import Frames
from xditd.rank.rest import resting, turning
from xditd.rank.transfer import Transfer


class Text:
    """The worker of a text encoder. It keeps nothing between turns.

    Args:
        network: on the device.
        transfer: of this rank's tensors.
        device: this rank's.
        attention: the kernel's name.
    """

    def __init__(self, network: TextEncoder, transfer: Transfer, device: Device, attention: str) -> None:
        self.attention = attention
        self.weights, self.host_weights = network.weights.counted(network.backbone)
        self.device_memory = device.memory
        self.usable = device.usable
        self._network = network
        self._transfer = transfer
        handlers: Handlers = {
            orders.TurnEncodeText: self.encode,
            orders.ForgetRun: lambda order, frames: None,
            orders.DropSegments: lambda order, frames: transfer.drop(order.segments),
            **resting(network, device),
        }
        self.handlers = turning(handlers, network)

    def encode(self, order: orders.TurnEncodeText, frames: Frames) -> Answer:
        # Kept: what the tokens were when they were checked, they must be when they are looked up.
        tokens = self._transfer.receive(order.tokens, frames, keep=True)
        vectors = None if order.vectors is None else self._transfer.receive(order.vectors, frames)
        mask = None if order.mask is None else self._transfer.receive(order.mask, frames)
        hidden, pooled = self._network.encode(
            tokens,
            vectors=vectors,
            mask=mask,
            layer=order.layer,
            final_norm=order.final_norm,
            pooled=order.pooled,
        )
        results = [(hidden, order.out, "float32")]
        if pooled is not None:
            results.append((pooled, order.pooled_out, "float32"))
        return Answer(*self._transfer.deliver(results, frames))
