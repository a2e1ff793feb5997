"""One request that waits for its answer. It knows no sockets; whoever changes it holds the connection's lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from threading import Condition
from typing import Any, Protocol

from msgspec import Struct

from xditd.protocol import messages as m
from xditd.protocol.errors import Code, XditError

ANSWERS: dict[type[Struct], type[Struct]] = {
    m.Hello: m.Welcome,
    m.Status: m.StatusReport,
    m.Models: m.ModelList,
    m.Explain: m.Explained,
    m.Load: m.Loaded,
    m.Unload: m.Unloaded,
    m.Sleep: m.Slept,
    m.FreeMemory: m.MemoryFreed,
    m.OpenRun: m.RunOpened,
    m.PutConditioning: m.ConditioningPut,
    m.Denoise: m.Denoised,
    m.Sample: m.Sampled,
    m.Decode: m.Decoded,
    m.Encode: m.Encoded,
    m.EncodeText: m.TextEncoded,
    m.Cancel: m.Cancelled,
    m.Close: m.Closed,
    m.Drain: m.Drained,
    m.Watch: m.Watched,
}
"""What answers each request, where it does not fail."""


class Tensors(Protocol):
    """The tensors of a request on their way: a `Parcel`, or a `Step` of a denoiser."""

    @property
    def frames(self) -> Sequence[Any]:
        """To be sent after the header."""

    def release(self) -> None:
        """Gives back what is held for them. Only when no rank can touch it any more."""


class Request:
    """A request from its sending to its answer.

    Attributes:
        answer: the message that answers it, or the error that stands for it; None until then.
        frames: of the answer.
        events: (event, frames) that came before the answer and were not taken yet.
        parcel: its tensors; released here if it is abandoned, by the asker otherwise.
        by_lane: it went by the lane.
        abandoned: nobody waits for it any more; `late` is called with its answer.
        unheard: it was refused because the daemon does not know this client any more.
        woken: what a thread waits on that does not read the socket itself.
    """

    __slots__ = (
        "abandoned",
        "answer",
        "by_lane",
        "events",
        "frames",
        "id",
        "kind",
        "late",
        "parcel",
        "unheard",
        "woken",
    )

    def __init__(self, request_id: int, kind: type[Struct], parcel: Tensors | None) -> None:
        self.id = request_id
        self.kind = kind
        self.parcel = parcel
        self.answer: Struct | XditError | None = None
        self.frames: list[Any] = []
        self.events: deque[tuple[Any, list[Any]]] = deque()
        self.by_lane = False
        self.abandoned = False
        self.unheard = False
        self.late: Callable[[Any], None] | None = None
        self.woken: Condition | None = None

    def result(self) -> tuple[Any, list[Any]]:
        """The answer and its frames.

        Raises:
            XditError: it failed.
        """
        answer = self.answer
        if isinstance(answer, XditError):
            raise anew(answer)
        if isinstance(answer, m.Failed):
            raise failure(answer)
        if not isinstance(answer, ANSWERS[self.kind]):
            raise XditError(
                Code.BAD_MESSAGE, f"The daemon answered {self.kind.__name__} with {type(answer).__name__}."
            )
        return answer, self.frames


def failure(answer: m.Failed) -> XditError:
    """The error that a `failed` carries."""
    error = XditError(answer.code, answer.message)
    error.details = dict(answer.details)  # not as keywords: the daemon may name one of them "message"
    return error


def anew(error: XditError) -> XditError:
    """A copy to raise: an error that many threads raise would gather their frames, and what these hold."""
    copy = XditError(error.code, error.message)
    copy.details = dict(error.details)
    return copy
