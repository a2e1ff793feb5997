"""Weights that wait in the host's memory and are on the device while they are needed alone. Knows no family and no rank.

What comes and goes together is a *part*: with "model" all weights, for a turn; with "layerwise" one layer (a block of a
transformer), just before it runs, while the layer that ran after it last time is on its way already. A part comes into
one buffer, of which its parameters are views; a layer that has run leaves its buffer to the next but one.

On a GPU a part waits in one piece of the host's memory, pinned where the driver does that, and comes by a stream of its
own. On a CPU it waits in the model's file: in the page cache, which is nobody's, and is converted each time.

A parameter whose part is away is NaN, in its own shape, dtype and device: what would be computed with it, shows.
docs/decisions says why this is not diffusers' group offloading.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from xditd.models.pinning import ALIGNMENT, Pinned
from xditd.models.reading import Placed, WeightFile
from xditd.models.splits import in_layers
from xditd.protocol.plans import LAYERS_AT_ONCE


@dataclass(slots=True)
class Home:
    """Where one parameter waits.

    Attributes:
        begin, shape, dtype: its place in its part.
        host: on a GPU its bytes in the host's memory, as its dtype and shape have them.
        own: on a CPU its value where that is not the file's, because LoRAs are merged into it.
        placed: the parameter, and where in the file it is from.
    """

    part: Part
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    host: torch.Tensor | None = None
    own: torch.Tensor | None = None
    placed: Placed | None = None
    away: bool = True

    def put(self, value: torch.Tensor, own: bool = True) -> None:
        """Has it wait with another value from now on, and be that where it is on the device.

        Args:
            own: the value is another than the file's.
        """
        if self.host is not None:
            self.host.copy_(value)
        else:
            self.own = value if own else None
        if self.part.here and self.placed is not None:
            self.placed.parameter.data.copy_(value)


@dataclass(slots=True)
class Part:
    """What comes and goes together: by name of its parameters where they wait, and its bytes in all."""

    homes: dict[str, Home] = field(default_factory=dict)
    nbytes: int = 0
    pinned: Pinned | None = None
    here: bool = False


class Offload:
    """The weights of a network that come and go. A `models.reading.Keeper`.

    Args:
        network: on the meta device, and divided already.
        layers: names of lists of its layers, in which * stands for anything; none makes one part of all weights.
        file: that it is read from.
        device: to which they come.
        dtype: of its arithmetic; in it weights come and wait.
        dtypes: by the name of a parameter, in what it does so if not in that.
    """

    uploads = False

    def __init__(
        self,
        network: nn.Module,
        layers: Sequence[str],
        file: WeightFile,
        device: torch.device,
        dtype: torch.dtype,
        dtypes: Mapping[str, torch.dtype] | None = None,
    ) -> None:
        self._file = file
        self._device = device
        self._dtype = dtype
        self._dtypes = dtypes or {}
        self._layers = list(in_layers(network, layers))
        owned = self._layers if layers else [network]
        names = {parameter: name for name, parameter in network.named_parameters()}
        self._parts = [self._part(module, names) for module in owned]
        self._by_name = {name: home for part in self._parts for name, home in part.homes.items()}
        self._away = {
            kept: torch.tensor(math.nan, device=device).to(kept) for kept in {dtype, *self._dtypes.values()}
        }
        self._buffers: list[torch.Tensor] = []
        self._loaded: dict[int, int] = {}  # by buffer: which part is in it, or on its way there
        self._after: dict[int, int] = {}  # by part: which one ran next, the last time
        self._last: int | None = None  # part that ran last
        self._running: int | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._come: list[Any] = []  # by buffer: an event, its part has come
        self._left: list[Any] = []  # by buffer: an event, its part has run
        for number, layer in enumerate(self._layers if layers else ()):
            layer.register_forward_pre_hook(self._enter(number))
            layer.register_forward_hook(self._leave(number))

    def _part(self, module: nn.Module, names: Mapping[nn.Parameter, str]) -> Part:
        part = Part()
        for parameter in module.parameters():
            dtype = self._dtypes.get(names[parameter], self._dtype)
            part.homes[names[parameter]] = Home(part, part.nbytes, tuple(parameter.shape), dtype)
            nbytes = parameter.numel() * dtype.itemsize
            part.nbytes += -(-nbytes // ALIGNMENT) * ALIGNMENT
        if self._device.type == "cuda":
            part.pinned = Pinned(part.nbytes, self._device)
            for home in part.homes.values():
                home.host = self._view(part.pinned.memory, home)
        return part

    # ---------------------------------------------------------------------------------------------- while it is loaded

    @property
    def names(self) -> Collection[str]:
        """Of the parameters that come and go."""
        return self._by_name.keys()

    def take(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Keeps a parameter's value of the file. Returns what stands for it in the network."""
        home = self._by_name[name]
        home.put(value, own=False)
        return self._gone(home)

    def adopt(self, placed: Mapping[str, Placed]) -> dict[str, Placed]:
        """Takes charge of the parameters that a file has filled. Returns them with where they wait."""
        adopted = {
            name: replace(one, home=self._by_name[name]) if name in self._by_name else one
            for name, one in placed.items()
        }
        for name, home in self._by_name.items():
            home.placed = adopted[name]
        return adopted

    # ------------------------------------------------------------------------------------------------- what it amounts to

    @property
    def waiting(self) -> int:
        """Bytes that wait in the host's memory."""
        return sum(part.nbytes for part in self._parts)

    @property
    def coming(self) -> int:
        """Bytes of the device that a turn takes for what comes."""
        return self._largest * self._wanted

    @property
    def here(self) -> int:
        """Bytes of the device that what has come takes now."""
        return sum(buffer.nbytes for buffer in self._buffers)

    @property
    def _largest(self) -> int:
        return max((part.nbytes for part in self._parts), default=0)

    @property
    def _wanted(self) -> int:
        return min(LAYERS_AT_ONCE, len(self._parts)) if self._layers else 1

    # ------------------------------------------------------------------------------------------------------- in a turn

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Around whatever computes with the network: gives it the memory that weights come into, and takes it back."""
        try:
            self._begin()
            yield
        finally:
            self._end()

    def _begin(self) -> None:
        self._buffers = [
            torch.empty(self._largest, dtype=torch.uint8, device=self._device) for _ in range(self._wanted)
        ]
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            self._come = [torch.cuda.Event() for _ in self._buffers]
            self._left = [torch.cuda.Event() for _ in self._buffers]
        if not self._layers:
            self._fetch(0, 0)
            self._arrive(0, 0)

    def _end(self) -> None:
        for part in self._parts:
            self._send_away(part)
        if self._stream is not None:  # what is on its way arrives before its memory is another's
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._buffers, self._come, self._left = [], [], []
        self._loaded.clear()
        self._last = self._running = None
        if self._stream is not None and not self._layers:
            torch.cuda.empty_cache()  # for the next model's turn

    def _enter(self, number: int) -> Any:
        def enter(module: nn.Module, arguments: Any) -> None:
            if not self._buffers:
                raise RuntimeError("a layer runs outside of a turn, and its weights are away")
            if self._last is not None:
                self._after[self._last] = number
            buffer = next((b for b, part in self._loaded.items() if part == number), None)
            if buffer is None:
                buffer = self._free()
                self._fetch(number, buffer)
            self._running = number
            self._arrive(number, buffer)
            following = self._after.get(number)
            if following is not None and following not in self._loaded.values():
                self._fetch(following, self._free())

        return enter

    def _leave(self, number: int) -> Any:
        def leave(module: nn.Module, arguments: Any, output: Any) -> None:
            if self._left:
                buffer = next(b for b, part in self._loaded.items() if part == number)
                self._left[buffer].record(torch.cuda.current_stream(self._device))
            self._send_away(self._parts[number])
            self._last, self._running = number, None

        return leave

    def _free(self) -> int:
        """A buffer whose part does not run: of two, one."""
        return next(b for b in range(len(self._buffers)) if self._loaded.get(b, -1) != self._running)

    def _fetch(self, number: int, buffer: int) -> None:
        """Has a part come into a buffer."""
        part, memory = self._parts[number], self._buffers[buffer]
        stream = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with stream:
            if self._stream is not None:
                self._stream.wait_event(self._left[buffer])
            if part.pinned is not None:
                memory[: part.nbytes].copy_(part.pinned.memory, non_blocking=part.pinned.pinned)
            else:
                for home in part.homes.values():
                    self._view(memory, home).copy_(self._value(home))
            if self._stream is not None:
                self._come[buffer].record(self._stream)
        self._loaded[buffer] = number

    def _arrive(self, number: int, buffer: int) -> None:
        """Waits for a part, and makes its parameters of it."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_event(self._come[buffer])
        part = self._parts[number]
        for home in part.homes.values():
            assert home.placed is not None
            home.placed.parameter.data = self._view(self._buffers[buffer], home)
        part.here = True

    def _send_away(self, part: Part) -> None:
        if not part.here:
            return
        part.here = False
        for home in part.homes.values():
            assert home.placed is not None
            home.placed.parameter.data = self._gone(home)

    def _gone(self, home: Home) -> torch.Tensor:
        return self._away[home.dtype].expand(home.shape)

    def _view(self, memory: torch.Tensor, home: Home) -> torch.Tensor:
        count = math.prod(home.shape)
        end = home.begin + count * home.dtype.itemsize
        return memory[home.begin : end].view(home.dtype).view(home.shape)

    def _value(self, home: Home) -> torch.Tensor:
        """On a CPU."""
        if home.own is not None:
            return home.own
        assert home.placed is not None
        return self._file.value(home.placed.piece, home.dtype, cut=home.placed.cut)
