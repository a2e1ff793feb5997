"""A rank whose forward is ComfyUI's own module, given only what came over the wire. Run inside ComfyUI's environment.

All but the network is xditd's: the messages, the loop, the worker's orders. With it nothing may differ from a local
model, to the last bit.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

from tests.comfy.inside import own

own.enter()

from xditd.protocol import orders  # noqa: E402
from xditd.rank import main as rank  # noqa: E402
from xditd.rank.answers import Answer  # noqa: E402
from xditd.rank.denoiser import Denoiser  # noqa: E402
from xditd.rank.device import Device  # noqa: E402
from xditd.rank.places import Frames  # noqa: E402
from xditd.rank.transfer import Transfer  # noqa: E402


class Network:
    """ComfyUI's Flux as `models.families.Transformer` has it."""

    def __init__(self, path: str) -> None:
        self.module = own.flux(path)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def condition(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, float]) -> dict[str, Any]:
        return {
            "context": tensors["context"],
            "y": tensors["pooled"],
            "guidance": values.get("guidance", 3.5),
        }

    def predict(self, x: torch.Tensor, t: torch.Tensor, conditioning: dict[str, Any]) -> torch.Tensor:
        batch = x.shape[0]
        guidance = conditioning["guidance"]
        return self.module(
            x,
            t,
            context=conditioning["context"].expand(batch, -1, -1),
            y=conditioning["y"].expand(batch, -1),
            guidance=guidance if isinstance(guidance, torch.Tensor) else torch.full((batch,), guidance),
        )


class Batching(Denoiser):
    """Computes items of one shape in one call, as ComfyUI does: a matrix product's last bits depend on its size."""

    def denoise(self, order: orders.TurnDenoise, frames: Frames) -> Answer:
        alike: dict[Any, list[int]] = {}
        given = [
            (self._transfer.receive(item.x, frames), self._conditioning(order.run, item.conditioning))
            for item in order.items
        ]
        for i, (x, conditioning) in enumerate(given):
            alike.setdefault((x.shape, conditioning["context"].shape[1]), []).append(i)
        outputs: list[Any] = [None] * len(given)
        for members in alike.values():
            x = torch.cat([given[i][0] for i in members])
            t = torch.cat([torch.tensor(order.items[i].t).expand(given[i][0].shape[0]) for i in members])
            joined = {name: _joined(name, given, members) for name in ("context", "y", "guidance")}
            for i, output in zip(
                members, self._network.predict(x, t, joined).chunk(len(members)), strict=True
            ):
                outputs[i] = output
        results = [
            (output, item.out, item.x.dtype) for output, item in zip(outputs, order.items, strict=True)
        ]
        return Answer(*self._transfer.deliver(results, frames))


def _joined(name: str, given: list[Any], members: list[int]) -> torch.Tensor:
    parts = []
    for i in members:
        x, conditioning = given[i]
        value = conditioning[name]
        if not isinstance(value, torch.Tensor):
            value = torch.tensor([value])
        parts.append(value.expand(x.shape[0], *value.shape[1:]))
    return torch.cat(parts)


def load(spec: Any, places: Any, faults: Any, tell: Any) -> Batching:
    tell("loading")
    torch.set_num_threads(max(1, spec.threads))
    transfer = Transfer(torch.device("cpu"), spec.rank, spec.world, places)
    return Batching(Network(spec.path), transfer, Device(spec.device), "comfyui")


if __name__ == "__main__":
    rank.load = load
    sys.exit(rank.main())
