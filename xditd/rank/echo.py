"""The rank without a model, for benchmarks of the hand-off: it copies as a real rank must, and computes nothing.

What comes in is copied from its slot to memory of this process, what goes out is copied to its slot: one memcpy
each way. Private memory is written to before its first use, since a page's first touch costs more than its copy.
Imports no torch.
"""

from __future__ import annotations

from xditd.protocol import orders
from xditd.protocol.tensors import Tensor
from xditd.rank.answers import Answer, Handlers
from xditd.rank.places import Frames, Places


class Echo:
    """The worker that answers what it was given: x for x, the noise for a sample.

    An image or latent that is larger than what it comes from begins with the bytes of that.
    """

    attention = "none"
    weights = host_weights = 0

    def __init__(self, places: Places, rank: int) -> None:
        self._places = places
        self._rank = rank
        self._memory = memoryview(bytearray())
        self._samples: dict[int, tuple[orders.BeginSample, memoryview]] = {}
        self.handlers: Handlers = {
            orders.SetConditioning: self.set_conditioning,
            orders.TurnDenoise: self.denoise,
            orders.BeginSample: self.begin_sample,
            orders.TurnSample: self.sample,
            orders.TurnDecode: lambda order, frames: self.convert(order.latent, order.out, frames),
            orders.TurnEncode: lambda order, frames: self.convert(order.image, order.out, frames),
            orders.ForgetRun: self.forget,
            orders.DropSegments: lambda order, frames: places.drop(order.segments),
            orders.Sleep: lambda order, frames: None,
            orders.Wake: lambda order, frames: None,
        }

    def device_memory(self) -> int | None:
        return None

    def usable(self) -> bool:
        return True

    def set_conditioning(self, order: orders.SetConditioning, frames: Frames) -> None:
        if self._rank == 0:
            self._take(list(order.tensors.values()), frames)

    def denoise(self, order: orders.TurnDenoise, frames: Frames) -> Answer:
        if self._rank != 0:
            return Answer()
        taken = self._take([item.x for item in order.items], frames)
        return self._give(
            [(memory, item.x, item.out) for memory, item in zip(taken, order.items, strict=True)], frames
        )

    def begin_sample(self, order: orders.BeginSample, frames: Frames) -> None:
        if self._rank == 0:
            noise = memoryview(bytearray(self._places.bytes(order.noise, frames)))
            self._samples[order.run] = order, noise

    def sample(self, order: orders.TurnSample, frames: Frames) -> Answer:
        if self._rank != 0:
            return Answer()
        begun, noise = self._samples[order.run]
        results: list[tuple[memoryview, Tensor, Tensor | None]] = []
        if order.step == len(begun.sigmas) - 2:
            del self._samples[order.run]
            results.append((noise, begun.noise, begun.out))
        shown = bool(begun.previews) or begun.preview_frames
        if shown:
            slot = begun.previews[order.step % len(begun.previews)] if begun.previews else None
            results.append((noise, begun.noise, slot))
        answer = self._give(results, frames)
        return Answer(answer.outputs[:-1], answer.frames, answer.outputs[-1]) if shown else answer

    def convert(self, given: Tensor, out: Tensor | None, frames: Frames) -> Answer:
        if self._rank != 0:
            return Answer()
        if out is not None:
            self._reserve(out.nbytes)
        (memory,) = self._take([given], frames)
        return self._give([(memory, given, out)], frames)

    def forget(self, order: orders.ForgetRun, frames: Frames) -> None:
        self._samples.pop(order.run, None)

    def _take(self, tensors: list[Tensor], frames: Frames) -> list[memoryview]:
        """Copies tensors to private memory, one after another; good until the next call."""
        self._reserve(sum(tensor.nbytes for tensor in tensors))
        taken, begin = [], 0
        for tensor in tensors:
            memory = self._memory[begin : begin + tensor.nbytes]
            memory[:] = self._places.bytes(tensor, frames).cast("B")
            taken.append(memory)
            begin += tensor.nbytes
        return taken

    def _give(self, results: list[tuple[memoryview, Tensor, Tensor | None]], frames: Frames) -> Answer:
        """Copies memory to slots whole, what is behind it too where a slot is larger; else makes frames of it."""
        outputs: list[Tensor] = []
        inline: list[bytes] = []
        for memory, like, slot in results:
            if slot is None:
                outputs.append(Tensor(dtype=like.dtype, shape=like.shape, frame=len(inline)))
                inline.append(bytes(memory))
                continue
            if slot.nbytes > memory.nbytes:
                memory = self._memory
            self._places.bytes(slot, frames)[:] = memory[: slot.nbytes]
            outputs.append(slot)
        return Answer(tuple(outputs), inline)

    def _reserve(self, nbytes: int) -> None:
        if self._memory.nbytes < nbytes:
            self._memory = memoryview(bytearray(b"\x5a") * nbytes)
