"""The orders that put a worker's weights to sleep and wake them: the same for everything that has a network."""

from __future__ import annotations

from typing import Any

from xditd.protocol import orders
from xditd.rank.answers import Handlers
from xditd.rank.device import Device
from xditd.rank.places import Frames


def resting(network: Any, device: Device) -> Handlers:
    """Handlers for a network that `models.families.load` made."""

    def sleep(order: orders.Sleep, frames: Frames) -> None:
        if not device.is_cuda and (loras := getattr(network, "loras", None)) is not None:
            loras.hold(())  # a CPU's weights wake as the file's; the next run with LoRAs has them merged anew
        network.weights.sleep()
        device.settle()

    def wake(order: orders.Wake, frames: Frames) -> None:
        network.weights.wake()
        device.settle()

    return {orders.Sleep: sleep, orders.Wake: wake}
