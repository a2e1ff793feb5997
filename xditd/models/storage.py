"""Weights kept in 8-bit floats, and cast to the dtype of the arithmetic layer by layer, as each runs. Knows no ranks.

Which: with "file" those that the file has in fp8, as it has them, with their scales: the numbers are those of the file cast
as a whole. With the name of an 8-bit float all of a network's values are rounded to it first, without a scale, as ComfyUI's
`weight_dtype` does, biases and norms among them; one that the file has with a scale stays as it is.

Kept so is what is in layers (blocks of a transformer), which is nearly all. The little outside them is rounded as well, and
lies in the dtype of the arithmetic: some of it is read by who does not call its module.

A LoRA is not rounded to 8 bits: its matrices lie beside a layer, and what they add is added in float32 as the layer is cast,
so that the layer computes with what merging would have given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from xditd.catalog.layouts.piece import Piece
from xditd.models.reading import DTYPES, Placed, WeightFile
from xditd.models.splits import in_layers
from xditd.protocol.plans import FP8


@dataclass(slots=True)
class Kept:
    """A parameter in an 8-bit float. A `models.reading.Kept`.

    Attributes:
        scale: that its values are multiplied with.
        away: while its layer runs, the 8-bit values; in their place is what is computed with.
    """

    parameter: torch.Tensor
    scale: float
    added: Sequence[Callable[[], torch.Tensor]] = ()
    away: torch.Tensor | None = None

    def cast(self, dtype: torch.dtype) -> torch.Tensor:
        """Its value."""
        value = self.parameter.data
        if self.scale == 1.0 and not self.added:
            return value.to(dtype)
        # In place: what this takes is counted (`catalog.lora_fit`).
        value = value.to(torch.float32).mul_(self.scale)
        for add in self.added:
            value.add_(add().reshape(value.shape))
        return value.to(dtype)


class Storage:
    """The weights of a network that are kept in 8-bit floats.

    Args:
        weight_dtype: one of `protocol.plans.WEIGHT_DTYPES`, and not "".
        network: on the meta device, and divided already.
        layers: names of lists of its layers, in which * stands for anything.
        exempt: names of parameters that are not rounded, in which * stands for anything.
        pieces: where parameters are in the file.
        file: that it will be read from. From here on it rounds.
        dtype: of its arithmetic.
    """

    def __init__(
        self,
        weight_dtype: str,
        network: nn.Module,
        layers: Sequence[str],
        exempt: Sequence[str],
        pieces: Mapping[str, Piece],
        file: WeightFile,
        dtype: torch.dtype,
    ) -> None:
        self._file = file
        self._dtype = dtype
        spared = [name for name in pieces if any(fnmatchcase(name, known) for known in exempt)]
        if weight_dtype in FP8:
            file.through = getattr(torch, weight_dtype)
            file.exempt = {pieces[name].key for name in spared}
        self._layers = list(in_layers(network, layers))
        names = {parameter: name for name, parameter in network.named_parameters()}
        self._names = [[names[parameter] for parameter in layer.parameters()] for layer in self._layers]
        self._kept: list[list[Kept]] = [[] for _ in self._layers]
        self.dtypes: dict[str, torch.dtype] = {}
        """By the name of each parameter that is kept so: in what."""
        for name in (name for names_of_one in self._names for name in names_of_one):
            kept = self._of(pieces.get(name))
            if kept is not None:
                self.dtypes[name] = kept
        sizes = {
            name: parameter.numel() for name, parameter in network.named_parameters() if name in self.dtypes
        }
        self.coming = dtype.itemsize * max(
            (sum(sizes.get(name, 0) for name in names_of_one) for names_of_one in self._names), default=0
        )
        """Bytes of the device that a turn takes for the layer that is cast."""

    def _of(self, piece: Piece | None) -> torch.dtype | None:
        entry = None if piece is None else self._file.header.tensors.get(piece.key)
        if piece is None or entry is None:
            return None  # whoever fills the network refuses the file for it
        own = DTYPES.get(entry.dtype)
        if entry.scale is not None:
            return own
        if self._file.through is not None:
            return None if piece.key in self._file.exempt else self._file.through
        return own if own in {getattr(torch, name) for name in FP8} else None

    def adopt(self, placed: Mapping[str, Placed]) -> dict[str, Placed]:
        """Takes charge of the parameters that a file has filled. Returns them with how they are kept.

        After `models.offload.Offload` was made: a layer is cast when it has come.
        """
        adopted = dict(placed)
        for layer, names, kept in zip(self._layers, self._names, self._kept, strict=True):
            for name in names:
                if name in self.dtypes:
                    one = placed[name]
                    of_one = Kept(one.parameter, self._file.scale(one.piece))
                    kept.append(of_one)
                    adopted[name] = replace(one, kept=of_one)
            layer.register_forward_pre_hook(self._enter(kept))
            # Before the offload's, which sends away what it finds; and always, or a failure left the layer cast.
            layer.register_forward_hook(self._leave(kept), prepend=True, always_call=True)
        return adopted

    def _enter(self, kept: Sequence[Kept]) -> Any:
        def enter(module: nn.Module, arguments: Any) -> None:
            for one in kept:
                value = one.cast(self._dtype)
                one.away, one.parameter.data = one.parameter.data, value

        return enter

    @staticmethod
    def _leave(kept: Sequence[Kept]) -> Any:
        def leave(module: nn.Module, arguments: Any, output: Any) -> None:
            for one in kept:
                if one.away is not None:
                    one.parameter.data, one.away = one.away, None

        return leave
