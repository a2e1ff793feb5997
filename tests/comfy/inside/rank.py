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

from xditd.models.reading import held  # noqa: E402
from xditd.protocol import orders  # noqa: E402
from xditd.protocol.noise import Noise  # noqa: E402
from xditd.rank import main as rank  # noqa: E402
from xditd.rank.answers import Answer  # noqa: E402
from xditd.rank.denoiser import Denoiser  # noqa: E402
from xditd.rank.device import Device  # noqa: E402
from xditd.rank.places import Frames  # noqa: E402
from xditd.rank.transfer import Transfer  # noqa: E402

Conditioning = dict[str, Any]
"""The keywords of a module's call, beside x and t: tensors, and numbers that are the same for a whole batch."""


def _flux(tensors: Mapping[str, torch.Tensor], values: Mapping[str, float]) -> Conditioning:
    return {"context": tensors["context"], "y": tensors["pooled"], "guidance": values.get("guidance", 3.5)}


def _sd3(tensors: Mapping[str, torch.Tensor], values: Mapping[str, float]) -> Conditioning:
    return {"context": tensors["context"], "y": tensors["pooled"]}


def _pixart(tensors: Mapping[str, torch.Tensor], values: Mapping[str, float]) -> Conditioning:
    if not values:
        return {"context": tensors["context"]}
    return {
        "context": tensors["context"],
        "c_size": torch.tensor([[values["height"], values["width"]]]),
        "c_ar": torch.tensor([[values["aspect_ratio"]]]),
    }


def _sdxl(tensors: Mapping[str, torch.Tensor], values: Mapping[str, float]) -> Conditioning:
    return {"context": tensors["context"], "y": tensors["vector"]}


def _hunyuandit(tensors: Mapping[str, torch.Tensor], values: Mapping[str, float]) -> Conditioning:
    given = {
        "context": tensors["context"].clone(),  # the module writes its padding into it
        "text_embedding_mask": tensors["mask"],
        "encoder_hidden_states_t5": tensors["context_t5"],
        "text_embedding_mask_t5": tensors["mask_t5"],
    }
    return given | ({"image_meta_size": torch.tensor([list(values.values())])} if values else {})


CONDITIONINGS = {"flux": _flux, "sd3": _sd3, "pixart": _pixart, "hunyuandit": _hunyuandit, "sdxl": _sdxl}


class NoLoras:
    """ComfyUI's module has its weights as they are in the file."""

    def hold(self, wanted: tuple[Any, ...]) -> None:
        assert not wanted


class Resident:
    """Its weights are always on the device: a `models.weights.Weights` that never sleeps."""

    offload = None

    def counted(self, network: torch.nn.Module) -> tuple[int, int]:
        return held(network), 0


class Network:
    """ComfyUI's module of a family as `models.families.Transformer` has it."""

    def __init__(self, family: str, path: str) -> None:
        self.module = self.backbone = own.module(family, path)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.condition = CONDITIONINGS[family]
        self.loras = NoLoras()
        self.weights = Resident()
        self.noise = Noise(predicts="flow")  # of the daemon's own loop, which these ranks are not asked for

    def predict(self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        batch = x.shape[0]
        keywords = {name: _whole(value, batch) for name, value in conditioning.items()}
        return self.module(x, t, **keywords)


def _whole(value: Any, batch: int) -> torch.Tensor:
    """A value for a whole batch."""
    if not isinstance(value, torch.Tensor):
        return torch.full((batch,), value)
    return value.expand(batch, *value.shape[1:])


class Batching(Denoiser):
    """Computes items of one shape in one call, as ComfyUI does: a matrix product's last bits depend on its size."""

    def denoise(self, order: orders.TurnDenoise, frames: Frames) -> Answer:
        alike: dict[Any, list[int]] = {}
        given = [
            (self._transfer.receive(item.x, frames), self._inputs.conditioning(order.run, item.conditioning))
            for item in order.items
        ]
        for i, (x, conditioning) in enumerate(given):
            shapes = [getattr(value, "shape", None) for value in conditioning.values()]
            alike.setdefault((x.shape, *shapes), []).append(i)
        outputs: list[Any] = [None] * len(given)
        for members in alike.values():
            x = torch.cat([given[i][0] for i in members])
            t = torch.cat([torch.tensor(order.items[i].t).expand(given[i][0].shape[0]) for i in members])
            joined = {
                name: torch.cat([_whole(given[i][1][name], given[i][0].shape[0]) for i in members])
                for name in given[members[0]][1]
            }
            for i, output in zip(
                members, self._network.predict(x, t, joined).chunk(len(members)), strict=True
            ):
                outputs[i] = output
        results = [
            (output, item.out, item.x.dtype) for output, item in zip(outputs, order.items, strict=True)
        ]
        return Answer(*self._transfer.deliver(results, frames))


def load(spec: Any, places: Any, faults: Any, tell: Any) -> Batching:
    tell("loading")
    torch.set_num_threads(max(1, spec.threads))
    transfer = Transfer(torch.device("cpu"), spec.rank, spec.world, places)
    return Batching(Network(spec.family, spec.path), transfer, Device(spec.device), "comfyui")


if __name__ == "__main__":
    rank.load = load
    sys.exit(rank.main())
