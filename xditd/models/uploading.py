"""Parameters of a file brought onto a device that has memory of its own: the file's bytes as they are, in the file's order, by way of
`models.staging`; a dtype is changed there. Knows no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Lock

import torch

from xditd.catalog.header import opened
from xditd.catalog.layouts.piece import Piece
from xditd.models import staging
from xditd.models.reading import WeightFile
from xditd.models.spans import Run
from xditd.models.splits import Cut

STAGED: dict[str, Callable[[torch.device, int, int], staging.Slots]] = {"cuda": staging.PinnedSlots}
"""By the kind of a device that has memory of its own: the slots by which bytes go there."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A parameter's value as it is to be.

    Attributes:
        piece: where it comes from.
        shape: of what is held of it.
        dtype: what it becomes.
        cut: takes this rank's part of it; None: it has all.
    """

    piece: Piece
    shape: tuple[int, ...]
    dtype: torch.dtype
    cut: Cut | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize


def has_memory(device: torch.device) -> bool:
    """Whether it has memory of its own, where bytes have to be brought."""
    return device.type in STAGED


def upload(
    file: WeightFile,
    all_wanted: Mapping[str, Wanted],
    device: torch.device,
    arrived: Callable[[str, torch.Tensor], None],
    values: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Brings what a file has of values to a device.

    Args:
        file: where they are from.
        all_wanted: by name.
        device: one that has memory of its own.
        arrived: is given each by its name, as `WeightFile.stored` has it, and has `converted` make a value of it where that is another.
            It is there until the next one comes; what the device is asked meanwhile still finds it.
        values: by name: where to bring what is not converted; what is not there is for the moment only as well.

    Raises:
        XditError: `file_invalid` for a file that was cut short meanwhile, or cannot be read.
    """
    if not all_wanted:
        return
    names = sorted(all_wanted, key=lambda name: _place(file, all_wanted[name].piece))
    own = {name: file.stored_dtype(one.piece, one.dtype) for name, one in all_wanted.items()}
    stay = {
        name: value
        for name, value in (values or {}).items()
        if name in all_wanted and not file.converts(all_wanted[name].piece, all_wanted[name].dtype)
    }
    passing = [all_wanted[name].elements * own[name].itemsize for name in names if name not in stay]
    scratch = torch.empty(max(passing, default=0), dtype=torch.uint8, device=device)
    with ExitStack() as stack:
        sources: list[staging.Source] = []
        for path in file.paths:
            opening, _ = stack.enter_context(opened(path, file.header.name))
            sources.append(staging.FileSource(opening.fileno(), file.header.name))
        items: list[staging.Item] = []
        one_by_one = Lock()
        for name in names:
            one = all_wanted[name]
            nbytes = one.elements * own[name].itemsize
            runs = file.runs(one.piece, one.cut)
            if runs is None:
                runs = (Run(len(sources), 0, nbytes),)
                sources.append(staging.MadeSource(_maker(file, one), nbytes, one_by_one))
            target = stay[name].view(-1).view(torch.uint8) if name in stay else scratch[:nbytes]
            items.append(staging.Item(runs, target))

        def come(number: int) -> None:
            name = names[number]
            raw = items[number].target
            arrived(name, raw.view(own[name]).view(all_wanted[name].shape))

        total = sum(item.target.numel() for item in items)
        threads = staging.readers()
        count = max(1, min(threads + staging.SPARE, -(-total // staging.SLOT)))
        slots = STAGED[device.type](device, count, staging.SLOT)
        try:
            staging.bring(items, sources, slots, threads, come)
        finally:
            slots.close()


def _place(file: WeightFile, piece: Piece) -> tuple[int, int, tuple[int, int]]:
    entry = file.header.tensors[piece.key]
    return entry.file, entry.begin, piece.rows or (0, 0)


def _maker(file: WeightFile, wanted: Wanted) -> Callable[[], torch.Tensor]:
    return lambda: file.stored(wanted.piece, wanted.dtype, wanted.cut)
