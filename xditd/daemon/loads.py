"""Clients' `load`s that wait: each for some replicas, and answered once when every one is ready or given up."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from xditd.catalog.catalog import Found
from xditd.daemon.fallback import Ladder
from xditd.daemon.groups import Group
from xditd.daemon.ports import ClientPort
from xditd.daemon.runs import Key
from xditd.daemon.work import failed, spell
from xditd.protocol import messages as m
from xditd.protocol.errors import Code


@dataclass(slots=True)
class Load:
    """One request, and what became of replicas that will not be there: code and sentence."""

    peer: bytes
    request: int
    ref: m.ModelRef
    found: Found
    since: float  # monotonic seconds
    keys: tuple[Key, ...]
    ladder: Ladder = field(default_factory=Ladder)  # what there may be instead
    lora: tuple[m.LoraMatch, ...] = ()
    problems: dict[Key, tuple[str, str]] = field(default_factory=dict)
    culprit: str = ""  # the device on which the last of them failed


class Loads:
    """The loads that are not answered."""

    def __init__(
        self,
        clients: ClientPort,
        lower: Callable[[Load, float], Iterable[Group] | None] = lambda load, now: None,
    ) -> None:
        """
        Args:
            lower: has a load that can have none of its replicas go on with less; returns the groups there are then,
                None where there is nothing less.
        """
        self.clients = clients
        self.lower = lower
        self.waiting: list[Load] = []

    def wants(self, key: Key) -> bool:
        return any(key in load.keys and key not in load.problems for load in self.waiting)

    def add(self, load: Load, groups: Iterable[Group], now: float) -> None:
        """Answers at once where everything is there already."""
        self.waiting.append(load)
        warm = not load.problems
        self._answer(load, list(groups), now, warm=warm)

    def tell(self, load: Load, groups: Iterable[Group]) -> None:
        """Says what it waits for, if it does."""
        if load in self.waiting:
            phase = next((g.phase for g in groups if g.key in load.keys and g.state != "ready"), "waiting")
            self.clients.answer(load.peer, m.Queued(re=load.request, run=None, position=0, phase=phase))

    def group_starting(self, group: Group) -> None:
        for load in self.waiting:
            if group.key in load.keys:
                loaded, total = group.progress
                event = m.Queued(
                    re=load.request, run=None, position=0, phase=group.phase, loaded=loaded, total=total
                )
                self.clients.answer(load.peer, event)

    def group_ready(self, groups: Iterable[Group], now: float) -> None:
        there = list(groups)
        for load in list(self.waiting):
            self._answer(load, there, now, warm=False)

    def given_up(
        self, group: Group, code: Code | str, message: str, groups: Iterable[Group], now: float
    ) -> None:
        there = list(groups)
        for load in list(self.waiting):
            if group.key in load.keys:
                load.problems[group.key] = spell(code), message
                load.culprit = group.culprit
                self._answer(load, there, now, warm=False)

    def forget_peer(self, peer: bytes) -> None:
        """A client is gone: nobody waits for its loads."""
        self.waiting = [load for load in self.waiting if load.peer != peer]

    def _answer(self, load: Load, groups: list[Group], now: float, *, warm: bool) -> None:
        """Answers if every replica is ready or given up. With one at least, the model serves."""
        ready = [g for key in load.keys for g in groups if g.key == key and g.state == "ready"]
        if len(ready) + len(load.problems) < len(load.keys):
            return
        if not ready and (lower := self.lower(load, now)) is not None:
            self._answer(load, list(lower), now, warm=False)
            return
        self.waiting.remove(load)
        if not ready:
            code, message = next(iter(load.problems.values()))
            self.clients.answer(load.peer, failed(load.request, code, message))
            return
        warnings = tuple(
            f"No replica on {', '.join(key.plan.devices)}: {message}"
            for key, (_, message) in load.problems.items()
        )
        first = ready[0]
        loaded = m.Loaded(
            re=load.request,
            group=first.name,
            plan=first.key.plan,
            model=first.found.info,
            dtype=first.key.dtype,
            seconds=now - load.since,
            warm=warm,
            groups=tuple(group.name for group in ready),
            warnings=warnings,
            lora=load.lora,
            degraded=load.ladder.degraded,
        )
        self.clients.answer(load.peer, loaded)
