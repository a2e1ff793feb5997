"""The orders that put a worker's weights to sleep and wake them, and turns for which weights come and go: the same for
everything that has a network."""

from __future__ import annotations

from typing import Any

from xditd.protocol import orders
from xditd.rank.answers import Handler, Handlers
from xditd.rank.device import Device
from xditd.rank.places import Frames


def resting(network: Any, device: Device) -> Handlers:
    """Handlers for a network that `models.families.load` made."""

    def sleep(order: orders.Sleep, frames: Frames) -> None:
        # Of weights in fp8 LoRAs lie beside them and would stay; a CPU's weights wake as the file's. The next run has them anew.
        beside = network.weights.storage is not None
        if (beside or not device.is_cuda) and (loras := getattr(network, "loras", None)) is not None:
            loras.hold(())
        network.weights.sleep()
        device.settle()

    def wake(order: orders.Wake, frames: Frames) -> None:
        network.weights.wake()
        device.settle()

    return {orders.Sleep: sleep, orders.Wake: wake}


def turning(handlers: Handlers, network: Any) -> Handlers:
    """The handlers of a network, whose offloaded weights are there for as long as a turn lasts."""
    offload = network.weights.offload
    if offload is None:
        return handlers

    def during(handler: Handler) -> Handler:
        def turn(order: Any, frames: Frames) -> Any:
            with offload.turn():
                return handler(order, frames)

        return turn

    return {kind: during(one) if kind in orders.TURNS else one for kind, one in handlers.items()}
