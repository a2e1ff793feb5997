"""LoRAs merged into a network's weights, and taken out again to the last bit. Knows no ranks and no runs.

A weight is always made anew from the model's file, which stays mapped: so what was merged before leaves no trace, and a
change of strength reads the file's pages and no more. The sum is computed in float32 and then cast, as ComfyUI does. A weight that is
kept in 8 bits stays as it is: what LoRAs add to it is added each time that it is cast (`models.storage`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache

import torch

from xditd.catalog.lora_file import Pair
from xditd.catalog.lora_fit import Change, fit
from xditd.models.reading import WeightFile
from xditd.models.splits import Cut
from xditd.models.uploading import Wanted, has_memory, upload
from xditd.protocol.orders import Merge

Changes = list[tuple[Change, WeightFile, float]]

Matrices = tuple[torch.Tensor, torch.Tensor]


class Loras:
    """What is merged into the weights of a network.

    Args:
        file: of the model; what it has filled is what LoRAs change.
        family: of the model.
        facts: of it, as its family's `detect` found them.
        device: where its weights are.
        dtype: of its weights.
    """

    def __init__(
        self,
        file: WeightFile,
        family: str,
        facts: Mapping[str, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._file = file
        self._family = family
        self._facts = facts
        self._device = device
        self._dtype = dtype
        self._held: tuple[Merge, ...] | None = ()  # None: a change of them failed half-way
        self._changed: set[str] = set()  # parameters that may differ from the file

    def hold(self, wanted: Sequence[Merge]) -> None:
        """Has exactly these merged, whatever was before; costs nothing where they are.

        Args:
            wanted: in the order in which they are added up.

        Raises:
            XditError: what `catalog.lora_fit.fit` finds wrong with a file. The next call makes all weights anew.
        """
        merges = tuple(merge for merge in wanted if merge.strength != 0.0)
        if merges == self._held:
            return
        changes = self._changes(merges)
        self._held = None
        stale = self._changed | changes.keys()
        self._changed = set(stale)
        self._lay_beside(stale, changes)
        self._make([name for name in stale if self._file.placed[name].kept is None], changes)
        self._changed = set(changes)
        self._held = merges

    def _changes(self, merges: Sequence[Merge]) -> dict[str, Changes]:
        """By parameter, of those that are held here: a stage of a pipeline has its own blocks alone."""
        changes: dict[str, Changes] = {}
        for merge in merges:
            file = WeightFile(merge.path)
            found = fit(file.header, self._family, self._facts, self._file.header.name)
            for change in found.changes:
                if change.target.parameter in self._file.placed:
                    changes.setdefault(change.target.parameter, []).append((change, file, merge.strength))
        return changes

    def _lay_beside(self, names: Collection[str], changes: Mapping[str, Changes]) -> None:
        """Has changes of parameters that are kept in 8 bits where they are cast. No two sets are on the device at once."""
        kept = {name: one.kept for name in names if (one := self._file.placed[name]).kept is not None}
        for beside in kept.values():
            beside.added = ()

        @cache  # some pairs change several parameters
        def lying(file: WeightFile, pair: Pair) -> Matrices:
            return matrices(file, pair, self._device)

        for name, beside in kept.items():
            beside.added = [
                Product(change, file, strength, lying(file, change.pair), self._file.placed[name].cut)
                for change, file, strength in changes.get(name, [])
            ]

    def _make(self, names: Collection[str], changes: Mapping[str, Changes]) -> None:
        """Parameters from the model's file, with these changes."""
        file = self._file
        # With a change as float32, which is rounded once.
        all_wanted = {
            name: Wanted(
                file.placed[name].piece,
                tuple(file.placed[name].memory.shape),
                torch.float32 if changes.get(name) else self._dtype,
                file.placed[name].cut,
            )
            for name in names
        }

        def come(name: str, stored: torch.Tensor) -> None:
            self._merge(name, file.converted(stored, all_wanted[name].piece, all_wanted[name].dtype), changes)

        if has_memory(self._device):
            upload(file, all_wanted, self._device, come)
            return
        for name, wanted in all_wanted.items():
            come(name, file.stored(wanted.piece, wanted.dtype, wanted.cut))

    def _merge(self, name: str, value: torch.Tensor, changes: Mapping[str, Changes]) -> None:
        """Adds a parameter's changes to its value of the file, and has it be that."""
        placed, of_one = self._file.placed[name], changes.get(name, [])
        for change, file, strength in of_one:
            product = Product(change, file, strength, matrices(file, change.pair, self._device), placed.cut)
            value = value + product().reshape(value.shape)  # not in place: it may be the file's own pages
        value = value.to(self._dtype)
        if placed.home is not None:
            placed.home.put(value, own=bool(of_one))
        elif has_memory(self._device):  # compiled code and other ranks' kernels know its address
            placed.parameter.data.copy_(value)
        else:
            placed.parameter.data = value


def matrices(file: WeightFile, pair: Pair, device: torch.device) -> Matrices:
    """A pair's up [outputs, rank] and down [rank, inputs], copied to the device in the file's dtype."""
    up, down = (file.tensor(key).to(device).flatten(1) for key in (pair.up, pair.down))
    return up, down


class Product:
    """What is added to a parameter, float32 [rows, columns]: strength · alpha / rank · up · down, or its rows of that.

    Args:
        change: which pair of matrices, and of which rows.
        file: of the LoRA.
        strength: that it is merged with.
        lying: the pair's matrices.
        cut: takes this rank's part of it.
    """

    def __init__(
        self, change: Change, file: WeightFile, strength: float, lying: Matrices, cut: Cut | None
    ) -> None:
        pair, self._target = change.pair, change.target
        self._up, self._down = lying
        alpha = float(file.tensor(pair.alpha)) if pair.alpha else float(pair.rank)
        self._factor = strength * (alpha / pair.rank)
        self._cut = cut

    def __call__(self) -> torch.Tensor:
        up, rows = self._up.to(torch.float32), self._target.rows
        if rows is not None:
            up = up[rows[0] : rows[1]]
        if self._target.swapped:
            up = torch.cat(up.chunk(2)[::-1])
        added = (up @ self._down.to(torch.float32)).mul_(self._factor)
        return added if self._cut is None else self._cut(added)
