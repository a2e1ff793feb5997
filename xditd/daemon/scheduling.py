"""Which of several groups with the same model takes a run. Pure: it is told what each has to do and how fast it was.

The four ways to choose, by the names that a `PlanRequest` has:

- `round_robin`: one after the other.
- `least_loaded`: the one with the least before it.
- `weighted_round_robin`: one after the other, a faster one more often: smooth, as nginx deals (a, a, b, a, c, a, a).
- `adaptive`: the one that would be done first, by how long its turns took lately and how much is before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

POLICIES = ("round_robin", "least_loaded", "weighted_round_robin", "adaptive")

RECENT = 0.2
"""Weight of the newest turn in a group's learned seconds: the last dozen turns make nearly all of it."""

COLD = 2.0
"""How much longer the first turn of a group is taken to last: it may compile, and its caches are empty."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A group that could take the run.

    Attributes:
        name: of the group; names order what is otherwise equal.
        ahead: effort of the runs that it has already, with those that share its devices (`work.effort`).
        seconds: that it takes for one effort, learned; None before its first turn.
        weight: of the configuration; 0 leaves it to what was learned.
        warm: it has done turns.
    """

    name: str
    ahead: float = 0.0
    seconds: float | None = None
    weight: float = 0.0
    warm: bool = True


@dataclass(slots=True)
class Rota:
    """What choosing one after the other must remember, for the groups of one model."""

    last: str = ""
    credits: dict[str, float] = field(default_factory=dict)

    def choose(self, policy: str, candidates: Sequence[Candidate], effort: float = 1.0) -> Candidate:
        """The candidate that takes the run.

        Args:
            policy: one of `POLICIES`.
            candidates: at least one, in the order of their devices.
            effort: of the run itself, where it is known.
        """
        if len(candidates) == 1:
            return candidates[0]
        if policy == "least_loaded":
            return min(candidates, key=lambda one: one.ahead)
        if policy == "weighted_round_robin":
            return self._smooth(candidates)
        if policy == "adaptive":
            usual = _usual(candidates)
            return min(candidates, key=lambda one: expected(one, effort, usual))
        return self._next(candidates)

    def _next(self, candidates: Sequence[Candidate]) -> Candidate:
        names = [one.name for one in candidates]
        index = names.index(self.last) + 1 if self.last in names else 0
        chosen = candidates[index % len(candidates)]
        self.last = chosen.name
        return chosen

    def _smooth(self, candidates: Sequence[Candidate]) -> Candidate:
        """Every candidate earns its weight; the richest is chosen, and pays what all have earned."""
        usual = _usual(candidates)
        weights = {one.name: weight(one, usual) for one in candidates}
        self.credits = {name: self.credits.get(name, 0.0) + earned for name, earned in weights.items()}
        chosen = max(candidates, key=lambda one: self.credits[one.name])
        self.credits[chosen.name] -= sum(weights.values())
        return chosen


def expected(candidate: Candidate, effort: float, usual: float) -> float:
    """Seconds until the run would be done there."""
    seconds = candidate.seconds if candidate.seconds is not None else usual
    return seconds * (candidate.ahead + effort) * (1.0 if candidate.warm else COLD)


def weight(candidate: Candidate, usual: float) -> float:
    """Its share: the configured one, else by its speed."""
    if candidate.weight:
        return candidate.weight
    return 1.0 / max(candidate.seconds if candidate.seconds is not None else usual, 1e-9)


def learn(known: float | None, seconds: float) -> float:
    """What is known of a group's seconds after one more turn."""
    return seconds if known is None else known + RECENT * (seconds - known)


def _usual(candidates: Sequence[Candidate]) -> float:
    """What a group that has not been tried is taken to need: as much as the fastest, so that it is tried."""
    return min((one.seconds for one in candidates if one.seconds is not None), default=1.0)
