"""What becomes of a plan that cannot be had: which failures lead to less, and to what. Pure.

A ladder has the plan that was asked for at its top, below it the same strategy with half the devices, with half of
those, and one device. What is below that is for want of memory alone: a batch that is computed one item after another (before
the last of several devices is given up), and one device with offload. The result of every rung is a true one. Who stands on a lower rung than they asked
for is *degraded*, and is told so and why. (Decision 9 of the design: never a faked result.)
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from msgspec import structs

from xditd.protocol.errors import Code
from xditd.protocol.plans import Plan, degrees_of, spell_degrees, spell_weights

LEADS_DOWN = frozenset(
    {
        # It does not come to serve. What died or hung at its start was tried again before: `model_failed`.
        ("start", Code.LOAD_FAILED.value),
        ("start", Code.MODEL_FAILED.value),
        ("start", Code.OUT_OF_MEMORY.value),
        ("start", Code.DEADLINE_EXCEEDED.value),
        # It served, and a turn was more than it can hold.
        ("turn", Code.OUT_OF_MEMORY.value),
        # It died or hung under one request, as often as that is asked again.
        ("turn", Code.RANK_LOST.value),
    }
)
"""When something failed and with which code: what is in here is tried with less. Anything else would fail there too."""


@dataclass(frozen=True, slots=True)
class Ladder:
    """Where somebody stands, and what is below.

    Attributes:
        asked: the plan at the top.
        rungs: plans below, nearest first; none where there is nothing less, or a fallback is not wanted.
        devices: that may be used, the asked ones in their order.
        blamed: devices on which something failed: others are taken where there are enough.
        at: the plan on which they stand.
        splits: whether a batch may be computed one item after another.
        singly: it is.
        problems: why each rung above was left, from the top down.
    """

    asked: Plan | None = None
    rungs: tuple[Plan, ...] = ()
    devices: tuple[str, ...] = ()
    blamed: frozenset[str] = frozenset()
    problems: tuple[str, ...] = ()
    at: Plan | None = None
    splits: bool = False
    singly: bool = False

    @staticmethod
    def of(plans: Sequence[Plan], rungs: tuple[Plan, ...], splits: bool = False) -> Ladder:
        """The ladder of replicas under these plans; on a lower rung one group stands in for all of them."""
        devices = dict.fromkeys(device for plan in plans for device in plan.devices)
        return Ladder(asked=plans[0], at=plans[0], rungs=rungs, devices=tuple(devices), splits=splits)

    def down(
        self, when: str, code: str, problem: str, blamed: str = "", batch: int = 1
    ) -> tuple[Plan, Ladder] | None:
        """The next plan, and the ladder from there; None where the failure does not lead down, or nothing is below.

        Args:
            when: "start" or "turn".
            problem: a sentence.
            blamed: the device on which it failed, where that is known.
            batch: items that were computed at once.
        """
        if not self.leads_down(when, code, batch):
            return None
        avoided = self.blamed | {blamed}
        below = replace(self, blamed=avoided, problems=(*self.problems, problem.rstrip(".")))
        if self.at is not None and self._split(when, code, batch):
            return self.at, replace(below, singly=True)
        rung = self._next(code)
        assert rung is not None
        choice = sorted(self.devices, key=avoided.__contains__)[: len(rung.devices)]
        devices = tuple(device for device in self.devices if device in choice)
        plan = structs.replace(rung, devices=devices)
        return plan, replace(below, at=plan, rungs=self.rungs[self.rungs.index(rung) + 1 :])

    def leads_down(self, when: str, code: str, batch: int = 1) -> bool:
        """Whether there is something less, and this failure leads there."""
        less = self._next(code) is not None or self._split(when, code, batch)
        return (when, code) in LEADS_DOWN and less

    def at_foot(self, batch: int) -> bool:
        """Whether less may be had, and for want of memory nothing exact is left to be tried."""
        return self.splits and not self.leads_down("turn", Code.OUT_OF_MEMORY.value, batch)

    def _next(self, code: str) -> Plan | None:
        """The nearest plan below that may help: to have weights elsewhere, or kept in fp8, helps for want of memory alone."""
        weights = ("", "") if self.at is None else (self.at.offload, self.at.weight_dtype)
        if code == Code.OUT_OF_MEMORY.value:
            return next((rung for rung in self.rungs if rung.weight_dtype or not weights[1]), None)
        return next((rung for rung in self.rungs if (rung.offload, rung.weight_dtype) == weights), None)

    def _split(self, when: str, code: str, batch: int) -> bool:
        """Whether the batch is what is given up now: before the last of several devices, and before weights have to move."""
        if not self.splits or self.singly or batch < 2 or (when, code) != ("turn", Code.OUT_OF_MEMORY.value):
            return False
        if self.at is None or self.at.pipefusion > 1:  # its patches are not of one item
            return False
        rung = self._next(code)
        return rung is None or len(rung.devices) == 1

    @property
    def degraded(self) -> str:
        """Why this is not what was asked for; "" at the top."""
        if not self.problems or self.asked is None:
            return ""
        now = "; batches are computed one item after another" if self.singly else ""
        return f"{spell(self.asked)} could not be had: {'; then: '.join(self.problems)}{now}"


def spell(plan: Plan) -> str:
    """ "ulysses 2 × ring 2 on cuda:0, cuda:1, cuda:2, cuda:3" """
    degrees = spell_degrees(degrees_of(plan)) or "The plan"
    offload = f" with {plan.offload} offload" if plan.offload else ""
    sharded = " with sharded weights" if plan.shard else ""
    kept = f" with weights in {spell_weights(plan)}" if plan.weight_dtype else ""
    return f"{degrees} on {', '.join(plan.devices)}{offload}{sharded}{kept}"


class Lately:
    """What could not be had within the last while, so that nobody waits for it to fail again.

    Args:
        window: seconds for which that is believed.
    """

    def __init__(self, window: float) -> None:
        self.window = window
        self._problems: dict[Hashable, tuple[float, str, str, str]] = {}

    def failed(self, key: Hashable, code: str, problem: str, culprit: str, now: float) -> None:
        if ("start", code) not in LEADS_DOWN:
            return
        self._problems = {k: v for k, v in self._problems.items() if now - v[0] < self.window}
        self._problems[key] = now, code, problem, culprit

    def forgive(self, key: Hashable) -> None:
        """It was asked for expressly, or it is there after all."""
        self._problems.pop(key, None)

    def problem(self, keys: Sequence[Hashable], now: float) -> tuple[str, str, str] | None:
        """Code, sentence and the device at fault, where none of these could be had."""
        known = [self._problems.get(key) for key in keys]
        told = [one[1:] for one in known if one is not None and now - one[0] < self.window]
        return told[0] if told and len(told) == len(keys) else None
