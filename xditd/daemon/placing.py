"""Which waiting run gets a place on which group. Decides; does nothing itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from xditd.daemon.experience import Experience
from xditd.daemon.groups import Group
from xditd.daemon.roster import Roster
from xditd.daemon.runs import Key, Run
from xditd.daemon.scheduling import Candidate, Rota

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
        on it; and while a run waits for that, or for room for its LoRAs, no other passes it there.

        Args:
            groups: that are ready and take runs.
        """
        if not roster.queued:
            return None
        free = {group.key: group for group in groups if roster.count_on(group) < self.places}
        for run in roster.line.firsts(now) if free else ():
            free_for_it = [free[key] for key in run.keys if key in free]
            roomy = [group for group in free_for_it if group.has_room_for(run.lora_bytes)]
            fitting = _with_its_loras(run, roomy, roster)
            if fitting:
                return run, fitting[0] if len(fitting) == 1 else self._choose(run, fitting, roster, groups)
            if free_for_it:
                del free[min(free_for_it, key=roster.count_on).key]
        return None

    def lora_bytes(self, roster: Roster, group: Group, groups: Collection[Group], now: float) -> int:
        """For LoRAs of how many bytes a group should have room: those of the run that it takes next, if no replica has that."""
        if not group.key.plan.weight_dtype:  # into its weights they are merged
            return 0
        run = next((run for run in roster.line.firsts(now) if group.key in run.keys), None)
        if run is None or any(
            one.key in run.keys and one.has_room_for(run.lora_bytes)
            for one in groups
            if one is not group and one.state in ("ready", "starting", "waking")
        ):
            return 0
        return run.lora_bytes

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
