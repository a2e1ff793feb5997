"""Tensor parallelism: every rank holds a share of each large layer, and computes with it. Exact up to rounding.

The layers are plain linear ones with plain tensors, smaller than the model's, so that whatever looks at a module
(diffusers' and xfuser's attention, LoRA) meets what it knows. docs/decisions says why they are no DTensors. Knows of a
family only its `Splits`, and no xfuser.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import nn

from xditd.models.filling import unfilled
from xditd.models.splits import Cut, Split, Splits


class TensorParallel:
    """This rank's place among those that share a network's layers.

    Args:
        degree: how many share them.
        index: which of these this rank is.
        group: torch.distributed's of them.
    """

    def __init__(self, degree: int, index: int, group: Any) -> None:
        self.degree = degree
        self.index = index
        self._group = group

    @classmethod
    def join(cls, degree: int, sequence: int, rank: int, world: int) -> TensorParallel:
        """Made by all ranks of a world at once, which have met.

        Ranks are numbered so that those of one sequence-parallel group are neighbours, then those that share layers,
        then the groups of cfg.

        Args:
            sequence: degree of sequence parallelism, ulysses × ring.
        """
        own: Any = None
        for first in range(0, world, degree * sequence):
            for offset in range(sequence):
                ranks = [first + offset + i * sequence for i in range(degree)]
                group = torch.distributed.new_group(ranks)  # made by all ranks, also those that are not in it
                own = group if rank in ranks else own
        return cls(degree, rank // sequence % degree, own)

    def divide(self, network: nn.Module, splits: Splits) -> Mapping[str, Cut]:
        """As `models.splits.Divide` says."""
        cuts: dict[str, Cut] = {}
        for name, module in list(network.named_modules()):
            if splits.attends(name):
                attention: Any = module
                attention.heads //= self.degree
            split = splits.of(name) if isinstance(module, nn.Linear) else None
            if split is not None and isinstance(module, nn.Linear):
                network.set_submodule(name, self._share(module, split))
                cuts |= {f"{name}.{kind}": cut for kind, cut in self._cuts(module, split).items()}
        return cuts

    def _cuts(self, whole: nn.Linear, split: Split) -> dict[str, Cut]:
        if split.kind == "inputs":
            return {"weight": Cut.share(1, whole.in_features, self.index, self.degree, split.parts)}
        cut = Cut.share(0, whole.out_features, self.index, self.degree, split.parts)
        return {"weight": cut} if whole.bias is None else {"weight": cut, "bias": cut}

    def _share(self, whole: nn.Linear, split: Split) -> nn.Linear:
        inputs, outputs, biased = whole.in_features, whole.out_features, whole.bias is not None
        with unfilled():
            if split.kind == "inputs":
                return Summed(inputs // self.degree, outputs, biased, self._group)
            if split.kind == "gathered":
                return Gathered(inputs, outputs // self.degree, biased, self._group, self.degree)
            return nn.Linear(inputs, outputs // self.degree, biased)


class Summed(nn.Linear):
    """Takes a share of the inputs; the ranks' results are summed, and the bias added once."""

    def __init__(self, inputs: int, outputs: int, biased: bool, group: Any) -> None:
        super().__init__(inputs, outputs, biased)
        self._group = group

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = F.linear(input, self.weight)
        torch.distributed.all_reduce(output, group=self._group)
        return output if self.bias is None else output + self.bias


class Gathered(nn.Linear):
    """Computes a share of the outputs; every rank gets them all."""

    def __init__(self, inputs: int, outputs: int, biased: bool, group: Any, degree: int) -> None:
        super().__init__(inputs, outputs, biased)
        self._group = group
        self._degree = degree

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        share = super().forward(input).contiguous()
        gathered = share.new_empty((self._degree * share.shape[0], *share.shape[1:]))
        torch.distributed.all_gather_into_tensor(gathered, share, group=self._group)
        return torch.cat(gathered.chunk(self._degree), dim=-1)
