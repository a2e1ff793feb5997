"""What is said on the sockets that pass segments. It knows structs, no sockets and no memory.

On a daemon's arena socket: the daemon opens with `leased` and a descriptor, or `refused` and end of file. The
client asks with `grow` or `open_lane`, one at a time; the answer is `segment` or `lane` and a descriptor, or
`refused`. The connection is the lease: its end ends it. To rank 0 of a group, only `segment` records go, each with
a descriptor.
"""

from __future__ import annotations

from typing import Annotated, Union

from msgspec import Meta, Struct

VERSION = 1
"""Of this exchange alone; the messages over ZeroMQ have a version of their own."""

MAX_RECORD = 4096
"""Bytes of one record, one SEQPACKET datagram."""

Size = Annotated[int, Meta(ge=1, le=2**53)]
SegmentId = Annotated[int, Meta(ge=0, le=2**53)]


class Grow(Struct, frozen=True, kw_only=True, tag="grow", tag_field="type"):
    """Give me another segment."""

    nbytes: Size  # at least


class OpenLane(Struct, frozen=True, kw_only=True, tag="open_lane", tag_field="type"):
    """Give me a lane for the requests of steps. Once, and after my token was welcome."""


class Leased(Struct, frozen=True, kw_only=True, tag="leased", tag_field="type"):
    """Your lease has begun; here is its first segment."""

    version: int
    token: str  # the nonce to present in `hello`
    segment: SegmentId
    nbytes: Size


class Segment(Struct, frozen=True, kw_only=True, tag="segment", tag_field="type"):
    """Here is a segment."""

    segment: SegmentId
    nbytes: Size


class LaneOpened(Struct, frozen=True, kw_only=True, tag="lane", tag_field="type"):
    """Here is your end of a lane."""


class Refused(Struct, frozen=True, kw_only=True, tag="refused", tag_field="type"):
    """No: the code and the sentence of an XditError."""

    code: str
    message: str


ToClient = Union[Leased, Segment, LaneOpened, Refused]
ToDaemon = Union[Grow, OpenLane]
