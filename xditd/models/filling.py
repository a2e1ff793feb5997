"""A network made on torch's meta device, filled with the weights of a file: every key accounted for. Knows no family.

On a CPU a parameter is the file's own pages where it can be. On a GPU most share one piece of its memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from xditd.catalog.families.expected import BLOCKS
from xditd.catalog.header import Header
from xditd.catalog.layouts.piece import Piece
from xditd.models.pinning import ALIGNMENT
from xditd.models.reading import DTYPES, Keeper, Placed, Progress, WeightFile, local
from xditd.models.splits import Cut
from xditd.models.uploading import Wanted, has_memory, upload
from xditd.protocol.errors import Code, XditError

TELL_EVERY = 0.25
"""Seconds between two tellings."""

INITIALISERS = frozenset({nn.init.constant_, nn.init.kaiming_uniform_, nn.init.normal_, nn.init.uniform_})
"""What torch's layers give their parameters their first numbers with."""


@contextmanager
def unfilled() -> Iterator[None]:
    """Networks made meanwhile are on the meta device. Their layers draw no first numbers, which there cost time and are none."""
    with torch.device("meta"), _NoInitialising():
        yield


class _NoInitialising(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func in INITIALISERS else func(*args, **kwargs)


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
        network: made while `unfilled`; its parameters are replaced.
        pieces: by the name of the parameter, where it is in a file of the makers'.
        file: where they are read.
        device: where they go.
        dtype: what they become.
        cuts: by the name of a parameter, what of it the network holds; of the rest it holds all. Only that is read.
        keeper: has what of them comes and goes.
        dtypes: by the name of a parameter, what it becomes if not `dtype`.

    Raises:
        XditError: `file_invalid` naming the first keys that are missing or of another shape than the network's, or a file that
            was cut short meanwhile.
    """
    expected = {name: tuple(local(value).shape) for name, value in network.state_dict().items()}
    cuts, dtypes = cuts or {}, dtypes or {}
    _check(expected, pieces, cuts, file.header)
    all_wanted = {
        name: Wanted(pieces[name], shape, dtypes.get(name, dtype), cuts.get(name))
        for name, shape in expected.items()
    }
    told = _Telling(file.progress, sum(wanted.nbytes for wanted in all_wanted.values()))
    kept = () if keeper is None else keeper.names

    def put(name: str, value: torch.Tensor) -> None:
        _assign(network, name, keeper.take(name, value) if keeper is not None and name in kept else value)
        told.add(value.nbytes)

    stays = kept if keeper is not None and not keeper.uploads else ()
    sent = {name: wanted for name, wanted in all_wanted.items() if has_memory(device) and name not in stays}
    for name, wanted in all_wanted.items():
        if name not in sent:
            put(name, file.value(wanted.piece, wanted.dtype, wanted.cut))
    values = _room(sent, device, apart=kept)

    def come(name: str, stored: torch.Tensor) -> None:
        wanted = sent[name]
        if file.converts(wanted.piece, wanted.dtype):
            values[name].copy_(file.converted(stored, wanted.piece, wanted.dtype))
        put(name, values[name])

    upload(file, sent, device, come, values)
    network.requires_grad_(False).eval()
    parameters = dict(network.named_parameters())
    file.placed = {
        name: Placed(parameters[name], pieces[name], cuts.get(name))
        for name in expected
        if name in parameters
    }
    if keeper is not None:
        file.placed = keeper.adopt(file.placed)


def _assign(network: nn.Module, name: str, value: torch.Tensor) -> None:
    """As `load_state_dict(assign=True)` does, but of one, while others are still on their way."""
    module, _, attribute = name.rpartition(".")
    owner = network.get_submodule(module)
    if isinstance(getattr(owner, attribute), nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    setattr(owner, attribute, value)


def _room(
    all_wanted: Mapping[str, Wanted], device: torch.device, apart: Collection[str]
) -> dict[str, torch.Tensor]:
    """Memory for values. One piece for most: to ask a device for a thousand takes as long as to read half of them.

    Args:
        apart: names of those that have each its own.
    """
    begins, end = {}, 0
    for name, wanted in all_wanted.items():
        if name not in apart:
            begins[name] = end
            end += -(-wanted.nbytes // ALIGNMENT) * ALIGNMENT
    piece = torch.empty(end, dtype=torch.uint8, device=device) if end else None
    values = {}
    for name, wanted in all_wanted.items():
        if piece is not None and name in begins:
            raw = piece[begins[name] : begins[name] + wanted.nbytes]
            values[name] = raw.view(wanted.dtype).view(wanted.shape)
        else:
            values[name] = torch.empty(wanted.shape, dtype=wanted.dtype, device=device)
    return values


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
