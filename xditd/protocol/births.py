"""What is said between the daemon and its nursery (`rank.nursery`), as JSON. Private to one installation, as `orders` is.

A `Birth` goes to the nursery with descriptors, in this order: the pipe on which the new rank tells its pid, its output,
its end of the lane, and rank 0's end of the arena socket. `Warm` comes back once, when the nursery has imported.
"""

from __future__ import annotations

import struct

from msgspec import Struct

from xditd.protocol.orders import RankSpec

PID = struct.Struct("=i")
"""What a rank that was born tells first."""

MAX_BIRTH = 1 << 17
"""Bytes of a `Birth`: the path of a model and a few variables are a hundredth of it."""

MAX_FDS = 4


class Birth(Struct, frozen=True, kw_only=True):
    """Fork this rank."""

    spec: RankSpec
    environment: dict[str, str]  # beyond the daemon's own


class Warm(Struct, frozen=True, kw_only=True):
    """Ranks can be forked from now on."""

    seconds: float  # that the imports took
    left_out: tuple[str, ...] = ()  # of them, what cannot be imported before a fork: a rank does it itself
