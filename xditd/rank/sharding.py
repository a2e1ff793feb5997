"""Weight sharding: each rank holds a share of every layer's weights, and a layer is gathered just before it runs. Exact.

torch's fully_shard (FSDP2; Zhao et al. 2023), for ranks that split a sequence: they run the same layers at the same time. A
share is what a rank reads of the file, so that none ever holds the whole. Knows of a family nothing, and no xfuser.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from xditd.models.reading import Placed
from xditd.models.splits import Cut, Splits

WORTH = 0.002
"""Share of a network's parameters from which a linear layer is sharded, too, that is in no block and may be divided (`Splits`)."""


class Share:
    """Where a rank's share of one parameter is."""

    away = False

    def __init__(self, parameter: Any) -> None:
        self._parameter = parameter

    def put(self, value: torch.Tensor, own: bool = True) -> None:
        self._parameter.to_local().copy_(value)


class WeightSharding:
    """This rank's place among those that share a network's weights. A `models.reading.Keeper`.

    Args:
        degree: how many share them.
        index: which of these this rank is.
        group: torch.distributed's of them.
        device: of this rank.
    """

    uploads = True

    def __init__(self, degree: int, index: int, group: Any, device: torch.device) -> None:
        self._degree = degree
        self._index = index
        self._mesh = DeviceMesh.from_group(group, device.type)
        self._device = device
        self._sharded: dict[str, DTensor] = {}
        self._root: Any = None  # what is whole to FSDP

    @classmethod
    def join(cls, sequence: int, rank: int, world: int, device: torch.device) -> WeightSharding:
        """Made by all ranks of a world at once, which have met. Those that split one sequence are neighbours.

        Its group is one of its own: what is gathered while a layer computes must not wait for the layer's own exchange.

        Args:
            sequence: degree of sequence parallelism, ulysses × ring.
        """
        own: Any = None
        for first in range(0, world, sequence):
            group = torch.distributed.new_group(list(range(first, first + sequence)))
            own = group if first <= rank < first + sequence else own
        return cls(sequence, rank % sequence, own, device)

    def divide(self, network: nn.Module, splits: Splits) -> Mapping[str, Cut]:
        """As `models.splits.Divide` says."""
        layers = [
            layer for child in network.children() if isinstance(child, nn.ModuleList) for layer in child
        ]
        inside = {id(module) for layer in layers for module in layer.modules()}
        total = sum(parameter.numel() for parameter in network.parameters())
        large = [
            module
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear)
            and splits.of(name)
            is not None  # else its weight may be read without it being called, as by a pooling
            and id(module) not in inside
            and module.weight.numel() >= WORTH * total
        ]
        for module in (*layers, *large):
            fully_shard(module, mesh=self._mesh, reshard_after_forward=True)
        self._root = fully_shard(_Root([*layers, *large]), mesh=self._mesh)
        self._sharded = {
            name: parameter
            for name, parameter in network.named_parameters()
            if isinstance(parameter, DTensor)
        }
        return {name: self._cut(parameter.shape[0]) for name, parameter in self._sharded.items()}

    def _cut(self, rows: int) -> Cut:
        """As torch.chunk deals rows out: the last ranks may have fewer, or none."""
        each = -(-rows // self._degree)
        return Cut(0, ((min(self._index * each, rows), min((self._index + 1) * each, rows)),))

    @property
    def names(self) -> Collection[str]:
        return self._sharded.keys()

    def take(self, name: str, value: torch.Tensor) -> torch.Tensor:
        whole = self._sharded[name]
        # On a CPU it may be a view of the file, which LoRAs must not write to.
        share = value.clone() if self._device.type == "cpu" else value
        made: torch.Tensor = DTensor.from_local(
            share.contiguous(),
            whole.device_mesh,
            whole.placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )
        return made

    def adopt(self, placed: Mapping[str, Placed]) -> dict[str, Placed]:
        return {
            name: replace(one, home=Share(one.parameter)) if name in self._sharded else one
            for name, one in placed.items()
        }

    def around(self, call: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """A call of the network, as FSDP is to see it: a whole, whose layers are gathered by one stream."""
        return partial(self._root, call)


class _Root(nn.Module):
    """What is whole to FSDP. The network itself is not called as a module: xfuser's wrapper is, which calls its layers."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.sharded = nn.ModuleList(modules)

    def forward(self, call: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
        return call(*arguments)
