"""Which waiting run gets a place on which group, and what its client hears meanwhile. Decides; does nothing itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence

from xditd.daemon.experience import Experience
from xditd.daemon.groups import Group
from xditd.daemon.roster import Roster
from xditd.daemon.runs import Key, Run
from xditd.daemon.scheduling import Candidate, Rota
from xditd.protocol import messages as m

MAX_ROTAS = 256
"""Sets of replicas whose last choice is remembered; past that all begin anew."""


class Placing:
    """Places on groups.

    Args:
        places: runs that one group takes at once.
        weights: of devices, for `weighted_round_robin`; a group has that of its slowest device.
    """

    def __init__(self, places: int, weights: Mapping[str, float]) -> None:
        self.places = places
        self.weights = weights
        self.experience = Experience()
        self._rotas: dict[tuple[Key, ...], Rota] = {}

    def next(self, roster: Roster, groups: Collection[Group], now: float) -> tuple[Run, Group] | None:
        """The next run that gets a place, and where; None while there is none. It is bound before another is asked for.

        A group's weights have one set of LoRAs merged. So it takes runs with that set, and with another when no run is
        on it; and while a run waits for that, no other passes it there.

        Args:
            groups: that are ready and take runs.
        """
        if not roster.queued:
            return None
        free = {group.key: group for group in groups if roster.count_on(group) < self.places}
        for run in roster.line.firsts(now) if free else ():
            free_for_it = [free[key] for key in run.keys if key in free]
            fitting = _with_its_loras(run, free_for_it, roster)
            if fitting:
                return run, fitting[0] if len(fitting) == 1 else self._choose(run, fitting, roster, groups)
            if free_for_it:
                del free[min(free_for_it, key=roster.count_on).key]
        return None

    def news(
        self, runs: Sequence[Run], line: Sequence[Run], groups: Collection[Group], now: float
    ) -> Iterator[tuple[Run, m.Queued]]:
        """While a run waits for its first group, its client hears how far that is, whenever that has changed."""
        positions = {run.id: position for position, run in enumerate(line)}
        for run in runs:
            if run.state != "queued" or run.announced:
                continue
            mine = [group for group in groups if group.key in run.keys]
            starting = next((group for group in mine if group.state in ("starting", "waking")), None)
            phase, loaded, total = "waiting", 0, 0
            if starting is not None:
                phase, (loaded, total) = starting.phase, starting.progress
            told = positions[run.id], phase, loaded
            if run.told != told:
                run.told = told
                yield (
                    run,
                    m.Queued(
                        re=run.reopen,
                        run=run.id,
                        position=told[0],
                        phase=phase,
                        estimate=self.seconds_until(told[0], mine, now),
                        loaded=loaded,
                        total=total,
                    ),
                )

    def seconds_until(self, position: int, groups: Sequence[Group], now: float) -> float | None:
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

    def _choose(self, run: Run, fitting: Sequence[Group], roster: Roster, groups: Collection[Group]) -> Group:
        """The replica that the run's scheduling chooses."""
        devices = {group.name: group.devices for group in groups}
        ahead: dict[str, float] = defaultdict(float)  # by device: groups that share one wait for each other
        for name, runs in roster.held():
            effort = sum(other.effort for other in runs)
            for device in devices.get(name, ()):
                ahead[device] += effort
        candidates = [
            Candidate(
                group.name,
                ahead=max(ahead[device] for device in group.devices),
                seconds=self.experience.turn_seconds(group.key),
                weight=min(self.weights.get(device, 0.0) for device in group.devices),
                warm=group.turns > 0,
            )
            for group in fitting
        ]
        if len(self._rotas) > MAX_ROTAS:
            self._rotas.clear()
        chosen = self._rotas.setdefault(run.keys, Rota()).choose(run.scheduling, candidates, run.effort)
        return fitting[candidates.index(chosen)]


def _with_its_loras(run: Run, groups: Sequence[Group], roster: Roster) -> list[Group]:
    """Those that can have the run's LoRAs merged now; where one has them already and is free, those alone that do."""
    holding = [group for group in groups if group.loras == run.loras]
    if any(not roster.count_on(group) for group in holding):
        return holding
    return [group for group in groups if group.loras == run.loras or not roster.count_on(group)]


def opened(run: Run, group: Group) -> m.RunOpened:
    """The run has its first place."""
    return m.RunOpened(
        re=run.reopen,
        run=run.id,
        group=group.name,
        plan=group.key.plan,
        model=run.found.info,
        lora=run.lora,
        degraded=run.ladder.degraded,
    )


def rebound(run: Run, group: Group, request: int) -> m.Rebound:
    """The run has another place than it had, under a lower plan where its client has not heard of that."""
    why = run.ladder.degraded
    reason = f"{why if run.untold else 'its group died'}; {group.name} goes on with it"
    return m.Rebound(
        re=request, run=run.id, group=group.name, reason=reason, plan=group.key.plan, degraded=why
    )
