"""A group: the ranks that hold one model under one plan, as the daemon sees them. Knows no process or socket.

The states are in `states.GROUP`. A group is made, becomes ready, serves, and ends once: by leaving, or by
failing, which kills every rank, because a failure of one poisons the world of all. Its replacement carries the
same name and the next generation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from xditd.catalog.catalog import Found
from xditd.daemon import states
from xditd.daemon.runs import Key
from xditd.protocol.figures import GroupStatus, RankStatus
from xditd.protocol.messages import ModelRef
from xditd.protocol.orders import Merge, RankReady

PHASES = ("starting", "importing", "joining", "loading", "ready")
"""The phases of a starting rank, in order."""


@dataclass(slots=True)
class Rank:
    """One rank process, by what it reported."""

    rank: int
    device: str
    pid: int = 0
    phase: str = "starting"
    device_memory: int | None = None
    attention: str = ""
    weights: int | None = None
    host_weights: int = 0
    loaded: int = 0  # bytes of weights in place, while it loads
    total: int = 0

    @property
    def gone(self) -> bool:
        return self.phase == "gone"

    def ready(self, report: RankReady) -> None:
        """It has its weights, and says what they take and how it computes."""
        self.phase = "ready"
        self.device_memory = report.device_memory
        self.attention = report.attention
        self.weights = report.weights
        self.host_weights = report.host_weights


@dataclass(slots=True)
class Group:
    """One group of ranks under one plan."""

    name: str
    generation: int
    ref: ModelRef
    found: Found
    key: Key
    started: float  # monotonic seconds; while it waits for room, since when
    ranks: list[Rank] = field(default_factory=list)
    state: str = "waiting"
    ready_after: float | None = None  # seconds from start to ready
    turns: int = 0  # answered
    turn: int | None = None  # the order of the turn under way
    turn_since: float = 0.0  # monotonic seconds
    problem: str = ""
    code: str = ""
    culprit: str = ""  # the device on which it failed, where that is known
    excused: bool = False  # it failed of what one run brought with it: that counts against nobody else
    degraded: str = ""  # the plan that it stands in for, and why
    given_up: bool = False  # who waited for it was told that it does not come
    spare: bool = False  # a further replica: it starts only where that drives nobody out
    left_at: float | None = None  # monotonic seconds when it was told to leave, or was killed
    restart_at: float | None = None  # monotonic seconds when a gone group's next generation starts
    loras: tuple[Merge, ...] = ()  # that its weights have merged
    lora_bytes: int = 0  # of each device, that it is counted with for LoRAs beside weights in fp8
    used: float = 0.0  # monotonic seconds of the last turn or binding
    asked: float | None = None  # monotonic seconds since when it waits for room
    slept: int = 0  # how often it was put to sleep
    resting: bool = False  # its ranks have given the devices' memory back, and were not told to take it again

    def __post_init__(self) -> None:
        if not self.ranks:
            self.ranks = [Rank(i, device) for i, device in enumerate(self.key.plan.devices)]

    def go(self, event: str) -> None:
        self.state = states.after(states.GROUP, self.state, event)

    def successor(self, now: float) -> Group:
        """The next generation, which waits for room."""
        return Group(
            self.name,
            self.generation + 1,
            self.ref,
            self.found,
            self.key,
            started=now,
            used=now,
            degraded=self.degraded,
        )

    @property
    def alive(self) -> bool:
        return self.state in states.GROUP_ALIVE

    @property
    def devices(self) -> tuple[str, ...]:
        return self.key.plan.devices

    def has_room_for(self, loras: int) -> bool:
        """Whether a run's LoRAs, of so many bytes, can be had with the memory that it is counted with."""
        return not self.key.plan.weight_dtype or loras <= self.lora_bytes  # merged they take none

    @property
    def phase(self) -> str:
        """The phase of the slowest rank: what people wait for."""
        if self.state in ("waiting", "dozing", "asleep"):  # for room, in which to start or to wake
            return "waiting"
        if self.state == "waking":
            return "waking"
        known = [PHASES.index(r.phase) for r in self.ranks if r.phase in PHASES]
        return PHASES[min(known)] if known else "starting"

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes of weights in place, and of how many, in all ranks; zeros where they do not load."""
        if self.phase != "loading" or not all(rank.total for rank in self.ranks):
            return 0, 0
        return sum(rank.loaded for rank in self.ranks), sum(rank.total for rank in self.ranks)

    @property
    def all_ready(self) -> bool:
        return all(rank.phase == "ready" for rank in self.ranks)

    @property
    def all_asleep(self) -> bool:
        return all(rank.phase == "asleep" for rank in self.ranks)

    @property
    def all_gone(self) -> bool:
        return all(rank.gone for rank in self.ranks)

    def status(self, runs: int, rss: dict[int, int]) -> GroupStatus:
        info = self.found.info
        return GroupStatus(
            group=self.name,
            generation=self.generation,
            state=self.state,
            model=self.ref,
            family=info.family,
            variant=info.variant,
            dtype=self.key.dtype,
            plan=self.key.plan,
            ranks=tuple(
                RankStatus(
                    rank=r.rank,
                    pid=r.pid,
                    device=r.device,
                    phase=r.phase,
                    rss=rss.get(r.pid),
                    device_memory=r.device_memory,
                    attention=r.attention,
                    weights=r.weights,
                    host_weights=r.host_weights,
                )
                for r in self.ranks
            ),
            runs=runs,
            turns=self.turns,
            seconds=self.ready_after,
            problem=self.problem,
            degraded=self.degraded,
        )


NEAREST = ("ready", "waking", "asleep", "dozing", "starting", "waiting", "failed", "leaving", "gone")
"""States by how soon a group in them, or its replacement, serves."""


def nearest(groups: Iterable[Group], key: Key) -> Group | None:
    """The group for a key that serves, or will soonest."""
    present = [group for group in groups if group.key == key]
    return min(present, key=lambda group: NEAREST.index(group.state), default=None)


MAX_BACKOFF = 60.0
"""Seconds that a new try waits at most."""


class Restarts:
    """How often a model may fail: after `limit` times within `window` seconds it is given up.

    The first new try comes at once, the next after `backoff` seconds, doubled each time. An explicit `load`
    forgives.
    """

    def __init__(self, limit: int, window: float, backoff: float = 0.0) -> None:
        self.limit = limit
        self.window = window
        self.backoff = backoff
        self._failures: dict[Key, deque[float]] = {}

    def failed(self, key: Key, now: float) -> None:
        self._failures.setdefault(key, deque()).append(now)

    def exhausted(self, key: Key, now: float) -> bool:
        failures = self._failures.get(key)
        if failures is None:
            return False
        while failures and failures[0] <= now - self.window:
            failures.popleft()
        return len(failures) >= self.limit

    def delay(self, key: Key) -> float:
        """Seconds to wait before the next try."""
        failures = len(self._failures.get(key, ()))
        return 0.0 if failures < 2 else min(self.backoff * 2.0 ** (failures - 2), MAX_BACKOFF)

    def forgive(self, key: Key) -> None:
        self._failures.pop(key, None)
