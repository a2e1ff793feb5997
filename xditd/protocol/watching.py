"""The messages of those who watch: what happens to groups, runs and clients."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from xditd.protocol.plans import ModelRef

Id = Annotated[int, Meta(ge=0, le=2**53)]


class Watch(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="watch", tag_field="type"):
    """Be told what happens; answered after `count` events, by another watch, or when the daemon stops."""

    id: Id
    after: Id | None = None  # number of the last event that is known; None: from now on, 0: all that is kept
    count: Annotated[int, Meta(ge=1, le=256)] = 64


class Watched(Struct, frozen=True, kw_only=True, tag="watched", tag_field="type"):
    re: Id
    last: Id  # number of the last event that was told: the next watch's `after`


class Happened(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="happened", tag_field="type"):
    """Before `watched`: something has happened."""

    re: Id
    number: Id  # one more than that of the event before; a gap tells of events that are not kept any more
    time: float  # seconds since 1970
    event: str  # "group_ready", "run_ended", ...; see protocol.md
    group: str = ""
    generation: int = 0
    model: ModelRef | None = None
    run: Id | None = None
    client: str = ""
    code: str = ""  # of what failed, or ended otherwise than it should
    message: str = ""  # one sentence for people
