"""What becomes of a plan that cannot be had: which failures lead to less, and to what. Pure.

A ladder has the plan that was asked for at its top, below it the same strategy with half the devices, with half of
those, and one device at its foot. The result of every rung is a true one. Who stands on a lower rung than they asked
for is *degraded*, and is told so and why. (Decision 9 of the design: never a faked result.)
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from msgspec import structs

from xditd.protocol.errors import Code
from xditd.protocol.plans import Plan

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
        problems: why each rung above was left, from the top down.
    """

    asked: Plan | None = None
    rungs: tuple[Plan, ...] = ()
    devices: tuple[str, ...] = ()
    blamed: frozenset[str] = frozenset()
    problems: tuple[str, ...] = ()

    @staticmethod
    def of(plans: Sequence[Plan], rungs: tuple[Plan, ...]) -> Ladder:
        """The ladder of replicas under these plans; on a lower rung one group stands in for all of them."""
        devices = dict.fromkeys(device for plan in plans for device in plan.devices)
        return Ladder(asked=plans[0], rungs=rungs, devices=tuple(devices))

    def down(self, when: str, code: str, problem: str, blamed: str = "") -> tuple[Plan, Ladder] | None:
        """The next plan, and the ladder from there; None where the failure does not lead down, or nothing is below.

        Args:
            when: "start" or "turn".
            problem: a sentence.
            blamed: the device on which it failed, where that is known.
        """
        if not self.leads_down(when, code):
            return None
        avoided = self.blamed | {blamed}
        rung = self.rungs[0]
        choice = sorted(self.devices, key=avoided.__contains__)[: len(rung.devices)]
        devices = tuple(device for device in self.devices if device in choice)
        below = replace(
            self, rungs=self.rungs[1:], blamed=avoided, problems=(*self.problems, problem.rstrip("."))
        )
        return structs.replace(rung, devices=devices), below

    def leads_down(self, when: str, code: str) -> bool:
        """Whether there is something less, and this failure leads there."""
        return (when, code) in LEADS_DOWN and bool(self.rungs)

    @property
    def degraded(self) -> str:
        """Why this is not what was asked for; "" at the top."""
        if not self.problems or self.asked is None:
            return ""
        return f"{spell(self.asked)} could not be had: {'; then: '.join(self.problems)}"


def spell(plan: Plan) -> str:
    """ "ulysses 2 × ring 2 on cuda:0, cuda:1, cuda:2, cuda:3" """
    names = ("cfg", "tensor", "pipefusion", "ulysses", "ring")
    named = [f"{name} {getattr(plan, name)}" for name in names if getattr(plan, name) > 1]
    return f"{' × '.join(named) or 'The plan'} on {', '.join(plan.devices)}"


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
