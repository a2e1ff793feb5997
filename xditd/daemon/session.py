"""One connected client, from its Hello to its end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from msgspec import Struct

from xditd.daemon.arenas import Arena
from xditd.handoff.lane import Lane
from xditd.protocol import messages as m
from xditd.protocol import tensors
from xditd.protocol.errors import Code, XditError
from xditd.protocol.tensors import Tensor


@dataclass(slots=True)
class Session:
    """A client. `peer` is its ZeroMQ identity; `arena` is its shared memory, None where it sends frames.

    `lane` is its shortcut for requests without frames; `asked_by_lane` are those that came by it and are not answered.
    """

    peer: bytes
    name: str
    pid: int
    arena: Arena | None
    last_id: int
    heard: float  # monotonic seconds of its last message
    alive: bool = True
    lane: Lane | None = None
    last_by_lane: int = 0
    asked_by_lane: set[int] = field(default_factory=set)

    def is_new(self, request: int, *, by_lane: bool = False) -> bool:
        """Whether this request has not been seen: ids increase on each way, so an older or equal one is a duplicate."""
        if request <= (self.last_by_lane if by_lane else self.last_id):
            return False
        if by_lane:
            self.last_by_lane = request
            self.asked_by_lane.add(request)
        else:
            self.last_id = request
        return True

    def answer_by_lane(self, reply: Struct, header: bytes) -> bool:
        """Sends an answer or event without frames back by the way that its request came. False: it is to go by ZeroMQ."""
        request = getattr(reply, "re", None)
        if request not in self.asked_by_lane:
            return False
        if not isinstance(reply, (m.Queued, m.Progress, m.Rebound, m.Happened)):
            self.asked_by_lane.discard(request)
        return self.lane is not None and self.lane.send(header)

    def check(self, message: Struct, frames: list[int]) -> None:
        """Refuses a request whose tensors are not where it says, before anybody reads them.

        Args:
            frames: sizes in bytes of the frames that came with it.

        Raises:
            XditError: `bad_tensor`, `bad_slot`.
        """
        segments = self.arena.segments if self.arena is not None else {}
        inputs: list[tuple[str, Tensor]] = []
        outputs: list[tuple[str, Tensor]] = []
        for what, tensor, is_output in places(message):
            if is_output and tensor.frame is not None:
                raise XditError(Code.BAD_SLOT, f"{what} names a frame; leave it out to be answered with one.")
            tensors.check(tensor, what, segments=segments, frames=frames)
            (outputs if is_output else inputs).append((what, tensor))
        tensors.check_apart(outputs, inputs)


def places(message: Struct) -> Iterator[tuple[str, Tensor, bool]]:
    """Every tensor that a request names: what it is to its sender, its description, whether it is written to."""
    if isinstance(message, m.PutConditioning):
        for name, tensor in message.tensors.items():
            yield f"conditioning {name!r}", tensor, False
    elif isinstance(message, m.Denoise):
        for index, item in enumerate(message.items):
            yield f"x of item {index}", item.x, False
            if item.out is not None:
                yield f"out of item {index}", item.out, True
    elif isinstance(message, m.Sample):
        yield "noise", message.noise, False
        if message.latent is not None:
            yield "latent", message.latent, False
        if message.out is not None:
            yield "out", message.out, True
        for index, preview in enumerate(message.previews):
            yield f"preview {index}", preview, True
    elif isinstance(message, m.EncodeText):
        yield "tokens", message.tokens, False
        for what in ("vectors", "mask", "out", "pooled_out"):
            tensor = getattr(message, what)
            if tensor is not None:
                yield what, tensor, what.endswith("out")
    elif isinstance(message, (m.Decode, m.Encode)):
        yield (
            ("latent", message.latent, False)
            if isinstance(message, m.Decode)
            else ("image", message.image, False)
        )
        if message.out is not None:
            yield "out", message.out, True
