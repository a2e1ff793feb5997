"""Weights of a safetensors file as tensors, and what is known of a parameter that has its value from there. Knows no family.

The file is mapped, not read: on a CPU a parameter whose dtype is the compute dtype *is* the file's page cache, so
ranks of one machine share it and hold no copy.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from xditd.catalog.header import Header, TensorEntry
from xditd.catalog.layouts.piece import Piece
from xditd.catalog.weights import read_weights
from xditd.models.spans import Run, rows_of
from xditd.models.splits import Cut

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The dtypes of files that are loaded, by the format's names (`catalog.families.expected.LOADABLE`)."""

Progress = Callable[[int, int], None]
"""Is told how many bytes of a network are in place, and of how many."""


class Home(Protocol):
    """Where the value of a parameter is kept that is not simply a tensor on the device.

    Attributes:
        away: outside of turns it is elsewhere.
    """

    away: bool

    def put(self, value: torch.Tensor, own: bool = True) -> None:
        """Has it be another value from now on; `own` is one that is not the file's."""


class Kept(Protocol):
    """A parameter that is kept in another dtype than it is computed with.

    Attributes:
        added: what comes on top of its value each time that it is cast, float32; in this order.
    """

    added: Sequence[Callable[[], torch.Tensor]]


class Keeper(Protocol):
    """Who keeps parameters otherwise than as plain tensors on the device.

    Attributes:
        uploads: what it takes is to be on the device.
    """

    uploads: bool

    @property
    def names(self) -> Collection[str]:
        """Of the parameters."""

    def take(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Keeps a parameter's value of the file. Returns what stands for it in the network."""

    def adopt(self, placed: Mapping[str, Placed]) -> dict[str, Placed]:
        """Takes charge of the parameters that a file has filled. Returns them with where they wait."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A parameter that a file has filled.

    Attributes:
        parameter: on its device.
        piece: where it came from.
        cut: takes this rank's part of it; None: it has all.
        home: where a value for it goes, if not simply there.
        kept: how it is kept, if not in the dtype of the arithmetic.
    """

    parameter: torch.Tensor
    piece: Piece
    cut: Cut | None
    home: Home | None = None
    kept: Kept | None = None

    @property
    def away(self) -> bool:
        """Whether it is elsewhere outside of turns."""
        return self.home is not None and self.home.away

    @property
    def memory(self) -> torch.Tensor:
        """What of it is in this process."""
        return local(self.parameter)


class WeightFile:
    """A model's file, mapped, or all files of its folder: its header, and its tensors as views of the mapping.

    Attributes:
        header: of it.
        paths: of its files.
        names: of one in diffusers' layout: by parameter of the network, its key; {} has the makers'.
        placed: the parameters that it has filled, by the network's name for them.
        through: what every value that has no scale is rounded to before it becomes anything else; None: to nothing.
        exempt: keys of those that are not.

    Raises:
        XditError: as `catalog.weights.read_weights` does.
    """

    def __init__(self, path: str | os.PathLike[str], progress: Progress | None = None) -> None:
        """
        Args:
            path: of the file or folder.
            progress: told while a network is filled.
        """
        self.progress = progress
        self.header: Header = read_weights(path)
        self.names: Mapping[str, str] = {}
        self.placed: dict[str, Placed] = {}
        self.through: torch.dtype | None = None
        self.exempt: Collection[str] = ()
        self.paths = [os.path.join(path, name) for name in self.header.files] or [os.fspath(path)]
        self._mapped = [_map(file) for file in self.paths]

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a view of the mapping."""
        return tensor.untyped_storage().data_ptr() in [mapped.data_ptr() for mapped in self._mapped]

    def let_go(self) -> None:
        """Takes the mapping's pages out of this process: they are in the page cache, and come back when they are read."""
        for mapped in self._mapped:
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(mapped.data_ptr()), ctypes.c_size_t(mapped.numel()), mmap.MADV_DONTNEED
            )

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor, on the CPU, in the file's dtype and without its scale: a view of the mapping; float32 of GGUF's blocks."""
        entry = self.header.tensors[key]
        return self._view(entry) if entry.dtype in DTYPES else self._dequantised(entry, None)

    def _view(self, entry: TensorEntry) -> torch.Tensor:
        dtype = DTYPES[entry.dtype]
        raw = self._raw(entry)
        if raw.storage_offset() % dtype.itemsize:
            raw = raw.clone()  # a writer that aligned nothing; torch cannot view it in place
        return raw.view(dtype).view(entry.shape)

    def _raw(self, entry: TensorEntry) -> torch.Tensor:
        offset = self.header.data_offset
        return self._mapped[entry.file][offset + entry.begin : offset + entry.end]

    def _dequantised(self, entry: TensorEntry, rows: tuple[int, int] | None) -> torch.Tensor:
        """Some rows of GGUF's blocks, float32; by the gguf package, whose numbers are the format's own."""
        import gguf

        kind = gguf.GGMLQuantizationType[entry.dtype]
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        shape, raw = entry.shape, self._raw(entry)
        whole = len(shape) > 1 and entry.elements // shape[0] % block == 0  # each row has blocks of its own
        if whole and rows is not None:
            shape = (rows[1] - rows[0], *shape[1:])
            raw = raw.view(entry.shape[0], -1)[rows[0] : rows[1]]
        values = torch.from_numpy(gguf.quants.dequantize(raw.reshape(-1, nbytes).numpy(), kind)).view(shape)
        return values if whole or rows is None else values[rows[0] : rows[1]]

    def value(self, piece: Piece, dtype: torch.dtype, cut: Cut | None = None) -> torch.Tensor:
        """A parameter's value, on the CPU; where nothing has to be changed, a view of the mapping.

        Args:
            piece: where it comes from.
            dtype: what it becomes; the file's own leaves a scale out.
            cut: takes this rank's part of it.
        """
        return self.converted(self.stored(piece, dtype, cut), piece, dtype)

    def stored(self, piece: Piece, dtype: torch.dtype, cut: Cut | None = None) -> torch.Tensor:
        """A parameter's value in the file's own dtype, without its scale; of GGUF's blocks in `dtype`. On the CPU."""
        entry = self.header.tensors[piece.key]
        if entry.dtype not in DTYPES:
            value = self._dequantised(entry, piece.rows).to(dtype)
        else:
            value = self._view(entry)
            if piece.rows is not None:
                value = value[piece.rows[0] : piece.rows[1]]
        if piece.swapped:
            value = torch.cat(value.chunk(2)[::-1])
        if piece.squeezed:
            value = value.flatten(1)
        if cut is not None:
            value = cut(value)
            if piece.swapped:
                value = value.clone()  # or the whole copy stays for the sake of a part
        return value

    def runs(self, piece: Piece, cut: Cut | None = None) -> tuple[Run, ...] | None:
        """Where in the files the bytes are that `stored` has, by the index of each file; None: it has to compute them."""
        entry = self.header.tensors[piece.key]
        if entry.dtype not in DTYPES or (cut is not None and cut.dim != 0):
            return None
        count = entry.shape[0] if entry.shape else 1
        each = (entry.end - entry.begin) // count if count else 0
        begin = self.header.data_offset + entry.begin
        held = rows_of(piece.rows or (0, count), piece.swapped, None if cut is None else cut.spans)
        return tuple(
            Run(entry.file, begin + first * each, (last - first) * each)
            for first, last in held
            if last > first
        )

    def stored_dtype(self, piece: Piece, dtype: torch.dtype) -> torch.dtype:
        """That of what `stored` returns."""
        return DTYPES.get(self.header.tensors[piece.key].dtype, dtype)

    def converts(self, piece: Piece, dtype: torch.dtype) -> bool:
        """Whether `converted` makes another value of what is stored."""
        own = self.stored_dtype(piece, dtype)
        return own != dtype or self._rounding(piece) not in (None, own)

    def converted(self, stored: torch.Tensor, piece: Piece, dtype: torch.dtype) -> torch.Tensor:
        """A parameter's value from what is stored of it, on whichever device that is."""
        if self.header.tensors[piece.key].scale is not None:
            if stored.dtype == dtype:
                return stored
            return (stored.to(torch.float32) * self.scale(piece)).to(dtype)
        rounding = self._rounding(piece)
        return (stored if rounding is None else stored.to(rounding)).to(dtype)

    def _rounding(self, piece: Piece) -> torch.dtype | None:
        scaled = self.header.tensors[piece.key].scale is not None
        return None if scaled or piece.key in self.exempt else self.through

    def scale(self, piece: Piece) -> float:
        """What a parameter's values in the file's own dtype are to be multiplied with."""
        scale = self.header.tensors[piece.key].scale
        return 1.0 if scale is None else float(self._view(scale))


def _map(path: str) -> torch.Tensor:
    """A file's bytes. Private: nobody writes to weights, and a write would not reach the file. Shared with others all the
    same until then, as the kernel copies a page at the first write only."""
    storage: Any = torch.UntypedStorage.from_file(path, False, os.path.getsize(path))
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def local(value: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor: of a sharded one its share."""
    share: torch.Tensor = value.to_local() if hasattr(value, "to_local") else value
    return share


def held(network: nn.Module) -> int:
    """Bytes of a network's parameters and buffers, each counted once; of what is away nothing."""
    present = [local(value) for value in network.state_dict().values()]
    values = [value for value in present if any(value.stride()) or value.numel() == 1]
    return sum({value.data_ptr(): value.numel() * value.itemsize for value in values}.values())
