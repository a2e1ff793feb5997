"""Weights from a safetensors file into a network made on torch's meta device. Knows no family.

The file is mapped, not read: on a CPU a parameter whose dtype is the compute dtype *is* the file's page cache, so
ranks of one machine share it and hold no copy; on a GPU it goes there through two pinned buffers.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from xditd.catalog.families.expected import BLOCKS
from xditd.catalog.header import Header, TensorEntry
from xditd.catalog.layouts.piece import Piece
from xditd.catalog.weights import read_weights
from xditd.models.splits import Cut
from xditd.protocol.errors import Code, XditError

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The dtypes of files that are loaded, by the format's names (`catalog.families.expected.LOADABLE`)."""

Upload = Callable[[torch.Tensor], torch.Tensor]
"""Takes a tensor to the device that it was made for."""

Progress = Callable[[int, int], None]
"""Is told how many bytes of a network are in place, and of how many."""

TELL_EVERY = 0.25
"""Seconds between two tellings."""

STAGING = 64 << 20
"""Bytes of one pinned buffer."""


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
        files = [os.path.join(path, name) for name in self.header.files] or [os.fspath(path)]
        self._mapped = [_map(file) for file in files]

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

    def value(
        self, piece: Piece, dtype: torch.dtype, upload: Upload | None = None, cut: Cut | None = None
    ) -> torch.Tensor:
        """A parameter's value; where nothing has to be changed, a view of the mapping.

        Args:
            piece: where it comes from.
            dtype: what it becomes; the file's own leaves a scale out.
            upload: takes it to another device, before it is converted.
            cut: takes this rank's part of it.
        """
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
        if upload is not None:
            value = upload(value.contiguous())
        if entry.scale is not None:
            return value if value.dtype == dtype else (value.to(torch.float32) * self.scale(piece)).to(dtype)
        if self.through is not None and piece.key not in self.exempt:
            value = value.to(self.through)
        return value.to(dtype)

    def scale(self, piece: Piece) -> float:
        """What a parameter's values in the file's own dtype are to be multiplied with."""
        scale = self.header.tensors[piece.key].scale
        return 1.0 if scale is None else float(self._view(scale))


class _Telling:
    """Tells of bytes as they come, now and then and at the end."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total = progress, total
        self._done, self._told = 0, 0.0

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        now = time.monotonic()
        if self._progress is not None and (now - self._told >= TELL_EVERY or self._done >= self._total):
            self._told = now
            self._progress(self._done, self._total)


def _map(path: str) -> torch.Tensor:
    """A file's bytes. Private: nobody writes to weights, and a write would not reach the file. Shared with others all the
    same until then, as the kernel copies a page at the first write only."""
    storage: Any = torch.UntypedStorage.from_file(path, False, os.path.getsize(path))
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def fill(
    network: nn.Module,
    pieces: Mapping[str, Piece],
    file: WeightFile,
    device: torch.device,
    dtype: torch.dtype,
    cuts: Mapping[str, Cut] | None = None,
    keeper: Keeper | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> None:
    """Gives every parameter and buffer of a network its value.

    Args:
        network: made on the meta device; its parameters are replaced.
        pieces: by the name of the parameter, where it is in a file of the makers'.
        file: where they are read.
        device: where they go.
        dtype: what they become.
        cuts: by the name of a parameter, what of it the network holds; of the rest it holds all. Only that is read.
        keeper: has what of them comes and goes.
        dtypes: by the name of a parameter, what it becomes if not `dtype`.

    Raises:
        XditError: `file_invalid` naming the first keys that are missing or of another shape than the network's.
    """
    expected = {name: tuple(local(value).shape) for name, value in network.state_dict().items()}
    cuts, dtypes = cuts or {}, dtypes or {}
    _check(expected, pieces, cuts, file.header)
    place = Uploader(device) if device.type == "cuda" else None
    into = {name: dtypes.get(name, dtype) for name in expected}
    total = sum(math.prod(shape) * into[name].itemsize for name, shape in expected.items())
    told = _Telling(file.progress, total)
    state = {}
    for name in expected:
        kept = keeper if keeper is not None and name in keeper.names else None
        upload = place if kept is None or kept.uploads else None
        value = file.value(pieces[name], into[name], upload, cuts.get(name))
        state[name] = value if kept is None else kept.take(name, value)
        told.add(value.nbytes)
    network.load_state_dict(state, assign=True, strict=True)
    network.requires_grad_(False).eval()
    if place is not None:
        place.finish()
    parameters = dict(network.named_parameters())
    file.placed = {
        name: Placed(parameters[name], pieces[name], cuts.get(name))
        for name in expected
        if name in parameters
    }
    if keeper is not None:
        file.placed = keeper.adopt(file.placed)


def local(value: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor: of a sharded one its share."""
    share: torch.Tensor = value.to_local() if hasattr(value, "to_local") else value
    return share


def held(network: nn.Module) -> int:
    """Bytes of a network's parameters and buffers, each counted once; of what is away nothing."""
    present = [local(value) for value in network.state_dict().values()]
    values = [value for value in present if any(value.stride()) or value.numel() == 1]
    return sum({value.data_ptr(): value.numel() * value.itemsize for value in values}.values())


def _check(
    expected: Mapping[str, tuple[int, ...]],
    pieces: Mapping[str, Piece],
    cuts: Mapping[str, Cut],
    header: Header,
) -> None:
    nowhere = [name for name in expected if name not in pieces]
    if nowhere:
        raise XditError(Code.FILE_INVALID, f"{header.name} has no key for {_some(nowhere)} of its network.")
    missing = [pieces[name].key for name in expected if pieces[name].key not in header.tensors]
    if missing:
        raise XditError(Code.FILE_INVALID, f"{header.name} lacks {_some(missing)}; fetch it again.")
    for name, shape in expected.items():
        piece = pieces[name]
        entry = header.tensors[piece.key]
        if entry.dtype not in (*DTYPES, *BLOCKS):
            raise XditError(
                Code.NOT_BUILT,
                f"{piece.key} of {header.name} is {entry.dtype}, which this version does not load; "
                "use the model's bf16 or fp16 file.",
            )
        found = piece.shape(entry.shape)
        if (cuts[name].shape(found) if name in cuts else found) != shape:
            raise XditError(
                Code.FILE_INVALID,
                f"{piece.key} of {header.name} has shape {list(entry.shape)}, which does not give "
                f"{name} its {list(shape)}.",
            )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


class Uploader:
    """Copies to a GPU through two pinned buffers: one is filled while the other is on its way."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = [torch.empty(STAGING, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._sent = [torch.cuda.Event(), torch.cuda.Event()]
        self._next = 0

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        target = torch.empty(value.shape, dtype=value.dtype, device=self._device)
        source, sink = value.view(-1).view(torch.uint8), target.view(-1).view(torch.uint8)
        for begin in range(0, source.numel(), STAGING):
            chunk = source[begin : begin + STAGING]
            buffer, sent = self._buffers[self._next][: chunk.numel()], self._sent[self._next]
            self._next ^= 1
            sent.synchronize()  # what it carried before has arrived
            buffer.copy_(chunk)
            sink[begin : begin + STAGING].copy_(buffer, non_blocking=True)
            sent.record()
        return target

    def finish(self) -> None:
        """Waits until all is there; the buffers may go then."""
        for sent in self._sent:
            sent.synchronize()
