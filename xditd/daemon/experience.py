"""What turns, runs and loads took so far, for those who must guess what the next will take. Knows no clock."""

from __future__ import annotations

from xditd.daemon.runs import Key
from xditd.daemon.scheduling import learn
from xditd.protocol.plans import Plan, shape

Kind = tuple[str, str, str, Plan]
"""A model in a dtype under a plan, on whichever devices."""


class Experience:
    """Learned seconds. A turn's are of its devices; a run's and a load's of any under such a plan."""

    def __init__(self) -> None:
        self._turns: dict[Key, float] = {}
        self._runs: dict[Kind, float] = {}
        self._loads: dict[Kind, float] = {}

    def turn(self, key: Key, seconds: float, effort: float) -> None:
        self._turns[key] = learn(self._turns.get(key), seconds / effort)

    def run(self, key: Key, seconds: float) -> None:
        """A run is over that held its place for so long."""
        self._runs[_kind(key)] = learn(self._runs.get(_kind(key)), seconds)

    def load(self, key: Key, seconds: float) -> None:
        self._loads[_kind(key)] = learn(self._loads.get(_kind(key)), seconds)

    def turn_seconds(self, key: Key) -> float | None:
        """Of a turn, for one effort (`work.effort`)."""
        return self._turns.get(key)

    def steps(self, path: str, part: str, dtype: str, effort: float) -> list[tuple[Plan, float]]:
        """Of a model, every plan that turns were done under, and what one of so much effort would take."""
        mine = (path, part, dtype)
        return [
            (key.plan, seconds * effort)
            for key, seconds in self._turns.items()
            if (key.path, key.part, key.dtype) == mine
        ]

    def run_seconds(self, key: Key) -> float | None:
        return self._runs.get(_kind(key))

    def load_seconds(self, key: Key) -> float | None:
        return self._loads.get(_kind(key))


def _kind(key: Key) -> Kind:
    return key.path, key.part, key.dtype, shape(key.plan)
