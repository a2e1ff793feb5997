"""What a run's client hears while it waits, is let in, or is moved. Decides nothing; knows no clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from xditd.daemon.experience import Experience
from xditd.daemon.groups import Group
from xditd.daemon.ports import ClientPort
from xditd.daemon.roster import Roster
from xditd.daemon.runs import Run
from xditd.daemon.turns import Turns
from xditd.protocol import messages as m

TELL_EVERY = 1.0
"""Seconds between two looks at who has moved up in the line."""


class Tidings:
    """Events of runs to their clients, and the answer to their opening."""

    def __init__(
        self,
        clients: ClientPort,
        roster: Roster,
        groups: Mapping[str, Group],
        turns: Turns,
        experience: Experience,
        places: int,
    ) -> None:
        """
        Args:
            groups: of the fleet, by name.
            places: runs that one group takes at once.
        """
        self.clients = clients
        self.roster = roster
        self.groups = groups
        self.turns = turns
        self.experience = experience
        self.places = places
        self._told_at = 0.0

    def waiting(self, runs: Iterable[Run], now: float) -> None:
        """While a run waits for its first group, its client hears how far that is, whenever that has changed."""
        waiting = [run for run in runs if run.state == "queued" and not run.announced]
        if not waiting:
            return
        line = {run.id: position for position, run in enumerate(self.roster.line.in_order(now))}
        for run in waiting:
            mine = [group for group in self.groups.values() if group.key in run.keys]
            starting = next((group for group in mine if group.state in ("starting", "waking")), None)
            phase, loaded, total = "waiting", 0, 0
            if starting is not None:
                phase, (loaded, total) = starting.phase, starting.progress
            position = line[run.id]
            if run.told == (position, phase, loaded):
                continue
            run.told = position, phase, loaded
            event = m.Queued(
                re=run.reopen,
                run=run.id,
                position=position,
                phase=phase,
                estimate=self._seconds_until(position, mine, now),
                loaded=loaded,
                total=total,
            )
            self.clients.answer(run.peer, event)

    def tick(self, now: float) -> None:
        """Looks who has moved up."""
        if now - self._told_at >= TELL_EVERY:
            self._told_at = now
            self.waiting(list(self.roster.queued), now)

    def opened(self, run: Run, group: Group) -> None:
        """The run has its first place."""
        answer = m.RunOpened(
            re=run.reopen,
            run=run.id,
            group=group.name,
            plan=group.key.plan,
            model=run.found.info,
            lora=run.lora,
            degraded=run.ladder.degraded,
        )
        self.clients.answer(run.peer, answer)

    def rebound(self, run: Run, request: int) -> None:
        """The run has another place than it had, under a lower plan where its client has not heard of that."""
        group, why = self.groups[run.group], run.ladder.degraded
        reason = f"{why if run.untold else 'its group died'}; {group.name} goes on with it"
        run.untold = False
        event = m.Rebound(
            re=request, run=run.id, group=group.name, reason=reason, plan=group.key.plan, degraded=why
        )
        self.clients.answer(run.peer, event)

    def positions(self, now: float) -> dict[int, int]:
        """How many runs are before each that waits, for a place or for a turn."""
        queue = self.roster.line.in_order(now)
        return self.turns.positions() | {run.id: before for before, run in enumerate(queue)}

    def _seconds_until(self, position: int, groups: Sequence[Group], now: float) -> float | None:
        """Seconds until a run is let in, by what runs and loads took before; None while that is not known.

        Args:
            position: runs before it.
            groups: that could take it.
        """
        ready = [group for group in groups if group.state == "ready"]
        if ready:
            lasts = self.experience.run_seconds(ready[0].key)
            return None if lasts is None else round(lasts * (position + 1) / (self.places * len(ready)), 3)
        loads = [
            max(0.0, known - (now - group.started))
            for group in groups
            if group.state == "starting" and (known := self.experience.load_seconds(group.key)) is not None
        ]
        return round(min(loads), 3) if loads else None
