"""What has happened, numbered; the last of it is kept, and clients that watch are told. Knows no socket or clock.

Nothing of it grows with a slow reader: a watch tells of a limited number of events and is then answered, so that
the client asks for more when it has read these; what it missed meanwhile is told from what is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from msgspec import Struct, structs

from xditd.protocol import messages as m

KEPT = 1024
"""Events that are kept for those who ask later."""


@dataclass(slots=True)
class Watch:
    """A client's request to be told, and how many events more it wants."""

    request: int
    left: int
    last: int  # number of the last event that it was told, or need not be told


class Chronicle:
    """The events of a daemon's life."""

    def __init__(self, answer: Callable[[bytes, Struct], None], clock: Callable[[], float]) -> None:
        """
        Args:
            answer: sends a client an event or answer.
            clock: seconds since 1970, for people: nothing is decided by them.
        """
        self._answer = answer
        self._clock = clock
        self._kept: deque[m.Happened] = deque(maxlen=KEPT)
        self._number = 0
        self._watches: dict[bytes, Watch] = {}

    def tell(self, event: str, **facts: Any) -> None:
        """Something has happened; the facts are fields of `happened`."""
        self._number += 1
        happened = m.Happened(re=0, number=self._number, time=self._clock(), event=event, **facts)
        self._kept.append(happened)
        for peer in list(self._watches):
            self._catch_up(peer)

    def watch(self, peer: bytes, request: m.Watch) -> None:
        """Tells the client what comes, and what is kept of what it asks for. Its watch before this one is over."""
        self._end(peer)
        last = self._number if request.after is None else request.after
        if last > self._number:  # of another life of the daemon
            last = 0
        self._watches[peer] = Watch(request.id, request.count, last)
        self._catch_up(peer)

    def forget(self, peer: bytes) -> None:
        """A client is gone."""
        self._watches.pop(peer, None)

    def close(self) -> None:
        """The daemon stops: every watch is answered."""
        for peer in list(self._watches):
            self._end(peer)

    def _catch_up(self, peer: bytes) -> None:
        watch = self._watches[peer]
        begin = max(0, len(self._kept) - (self._number - watch.last))
        for happened in list(islice(self._kept, begin, begin + watch.left)):
            watch.last = happened.number
            watch.left -= 1
            self._answer(peer, structs.replace(happened, re=watch.request))
        if not watch.left:
            self._end(peer)

    def _end(self, peer: bytes) -> None:
        watch = self._watches.pop(peer, None)
        if watch is not None:
            self._answer(peer, m.Watched(re=watch.request, last=watch.last))
