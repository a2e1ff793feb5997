"""A run: one sampling, from the request that opens it to its one end. Knows no socket, clock or device.

What a run was given (conditioning) and is asked (its request) is kept until it is answered or the run ends, so
that another group can take over when its own dies: a step is stateless, and a sample begins anew from its noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct

from xditd.catalog.catalog import Found, FoundLora
from xditd.daemon import states
from xditd.daemon.fallback import Ladder
from xditd.protocol.figures import RunStatus
from xditd.protocol.messages import (
    Decode,
    Denoise,
    Encode,
    EncodeText,
    LoraMatch,
    ModelRef,
    OpenRun,
    Plan,
    PutConditioning,
    Sample,
)
from xditd.protocol.orders import Merge

MAX_REBINDS = 2
"""How often one request is asked again of another group after its group died, before its run fails."""

Work = Denoise | Sample | Decode | Encode | EncodeText
"""The requests that need turns of a group."""


@dataclass(frozen=True, slots=True)
class Key:
    """What makes two groups interchangeable for a run: the same file, part, dtype and plan."""

    path: str
    part: str
    dtype: str
    plan: Plan


@dataclass(slots=True)
class Asked:
    """A request under way: its message, its frames, and how many of its turns are done."""

    work: Work
    frames: Sequence[Any] = ()
    step: int = 0
    seconds: float = 0.0  # that its turns took in the ranks
    rebinds: int = 0
    begun: bool = False  # a sample's BeginSample went out to the present group

    @property
    def turns(self) -> int:
        """Turns it needs in all: a sample's steps, or one."""
        return len(self.work.sigmas) - 1 if isinstance(self.work, Sample) else 1

    def begin_anew(self) -> None:
        self.step = 0
        self.begun = False


@dataclass(slots=True)
class Run:
    """One run. `peer` is the ZeroMQ identity of its client."""

    id: int
    peer: bytes
    client: str
    ref: ModelRef
    found: Found
    keys: tuple[Key, ...]  # of the replicas that may take it
    opened: float  # monotonic seconds
    reopen: int  # id of the OpenRun that asked for it
    label: str = ""
    priority: int = 0
    scheduling: str = "round_robin"
    loras: tuple[Merge, ...] = ()  # that its turns are done with
    lora: tuple[LoraMatch, ...] = ()  # what they change, for its client
    lora_bytes: int = 0  # that they take of each device where they lie beside weights in fp8
    state: str = "queued"
    group: str = ""
    asked: Asked | None = None
    conditioning: dict[str, tuple[PutConditioning, Sequence[Any]]] = field(default_factory=dict)
    rebinds: int = 0  # in its whole life
    announced: bool = False  # RunOpened was sent
    leaving: str = ""  # it ends with the turn that it is in: why
    touched: float = 0.0  # monotonic seconds of the last request or answer
    closing: bool = False  # its client has asked for its end
    due: list[tuple[bytes, Struct]] = field(default_factory=list)  # answers to those who asked for its end
    code: str = ""  # that it ended with
    problem: str = ""  # why it ended
    placed: float = 0.0  # monotonic seconds of the last binding
    effort: float = 1.0  # of one of its turns (`work.effort`), once it has asked for one
    ladder: Ladder = field(default_factory=Ladder)  # what it may be done with instead
    untold: bool = False  # it stands on a lower rung, and its client has not heard of it
    told: tuple[int, str, int] | None = None  # position, phase and bytes that its client heard last

    @classmethod
    def asked_for(
        cls,
        request: OpenRun,
        number: int,
        peer: bytes,
        client: str,
        found: Found,
        keys: tuple[Key, ...],
        now: float,
        loras: Sequence[FoundLora] = (),
        ladder: Ladder | None = None,
    ) -> Run:
        """A run as the request has it."""
        had = [one for one in loras if one.match.strength]
        merged = (Merge(path=one.path, strength=one.match.strength, stamp=one.stamp) for one in had)
        return cls(
            id=number,
            peer=peer,
            client=client,
            ref=request.model,
            found=found,
            keys=keys,
            opened=now,
            reopen=request.id,
            label=request.label,
            priority=request.priority,
            scheduling=request.plan.scheduling,
            loras=tuple(merged),
            lora=tuple(one.match for one in loras),
            lora_bytes=sum(one.bytes for one in had) + max((one.adding for one in had), default=0),
            touched=now,
            ladder=ladder or Ladder(),
        )

    def go(self, event: str) -> None:
        self.state = states.after(states.RUN, self.state, event)

    @property
    def key(self) -> Key:
        """Of its first replica: what they have in common is in every one of them."""
        return self.keys[0]

    @property
    def over(self) -> bool:
        return self.state in states.RUN_OVER

    def status(self, now: float, position: int) -> RunStatus:
        asked = self.asked
        total = asked.turns if asked and isinstance(asked.work, Sample) else 0
        return RunStatus(
            run=self.id,
            state=self.state,
            model=self.ref,
            group=self.group,
            label=self.label,
            client=self.client,
            step=asked.step if asked else 0,
            total=total,
            position=position,
            age=round(now - self.opened, 3),
            rebinds=self.rebinds,
            priority=self.priority,
            degraded=self.ladder.degraded,
        )
