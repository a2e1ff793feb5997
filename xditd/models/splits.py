"""How a network's layers may be divided among ranks, and what of a parameter one of them then holds. Pure; no ranks.

A transformer is divided by heads and by hidden features (Shoeybi et al. 2019, Megatron-LM): of two layers with
something between that takes features one by one, the first is divided by its outputs, the second by its inputs, and
the ranks' results are summed. A layer whose whole output every rank needs is divided by outputs, which are gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn

Kind = Literal["outputs", "inputs", "gathered"]


@dataclass(frozen=True, slots=True)
class Split:
    """How one linear layer is divided.

    Attributes:
        kind: "outputs" keeps each rank's outputs to itself, "inputs" takes a share of the inputs on each and sums,
            "gathered" divides the outputs and gathers them.
        parts: what the divided features are several of, in these proportions; each part is divided by itself.
    """

    kind: Kind
    parts: tuple[int, ...] = (1,)


@dataclass(frozen=True, slots=True)
class Splits:
    """Of a family's network.

    Attributes:
        layers: by the name of linear layers, in which * stands for anything: how they are divided. The rest is whole.
        attentions: names of modules whose `heads` are divided.
        blocks: names of the lists of blocks, in their order, where these may be dealt out to stages.
        first, last: names of layers that the first stage needs alone, and the last.
    """

    layers: Mapping[str, Split]
    attentions: tuple[str, ...]
    blocks: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()

    def of(self, name: str) -> Split | None:
        """How the layer of that name is divided; None is not at all."""
        return next((split for known, split in self.layers.items() if fnmatchcase(name, known)), None)

    def attends(self, name: str) -> bool:
        return any(fnmatchcase(name, known) for known in self.attentions)


OUTPUTS, INPUTS, GATHERED = Split("outputs"), Split("inputs"), Split("gathered")


@dataclass(frozen=True, slots=True)
class Cut:
    """What one rank holds of a parameter: spans of one dimension, each from and up to, one after another."""

    dim: int
    spans: tuple[tuple[int, int], ...]

    @classmethod
    def share(cls, dim: int, size: int, index: int, degree: int, parts: tuple[int, ...] = (1,)) -> Cut:
        """The share of one rank: of each part, the index-th of `degree` equal pieces.

        Raises:
            ValueError: where that does not come out even. The planner refuses such degrees before.
        """
        unit, rest = divmod(size, sum(parts))
        spans, begin = [], 0
        for part in parts:
            piece, odd = divmod(part * unit, degree)
            if rest or odd:
                raise ValueError(f"{size} features in parts of {parts} are not divided evenly by {degree}")
            spans.append((begin + index * piece, begin + (index + 1) * piece))
            begin += part * unit
        return cls(dim, tuple(spans))

    def shape(self, of: tuple[int, ...]) -> tuple[int, ...]:
        """The held part's shape, where the parameter has shape `of`; 0 of what it has not."""
        if self.dim >= len(of):
            return ()
        held = sum(max(0, min(end, of[self.dim]) - begin) for begin, end in self.spans)
        return (*of[: self.dim], held, *of[self.dim + 1 :])

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        """The held part of a parameter: a view where it is one span, else a copy."""
        held = [value.narrow(self.dim, begin, end - begin) for begin, end in self.spans]
        return held[0] if len(held) == 1 else torch.cat(held, self.dim)


Divide = Callable[[nn.Module, Splits], Mapping[str, Cut]]
"""Divides a network on torch's meta device, in place. Returns by parameter what is held of it; the rest is held whole."""


def in_layers(network: nn.Module, names: Sequence[str]) -> Iterator[nn.Module]:
    """The layers of a network that have parameters, in the lists of these names, in which * stands for anything."""
    for name, modules in network.named_modules():
        if isinstance(modules, nn.ModuleList) and any(fnmatchcase(name, known) for known in names):
            yield from (layer for layer in modules if next(layer.parameters(), None) is not None)
