"""Runs that go on with less than they asked for: a rung of their ladder (`fallback`) that the fleet can have."""

from __future__ import annotations

from dataclasses import replace

from xditd.daemon.fleet import Fleet
from xditd.daemon.ports import Witness
from xditd.daemon.roster import Roster
from xditd.daemon.runs import Run
from xditd.daemon.work import batch_of, spell
from xditd.protocol.errors import Code, XditError


class Descent:
    """The way down of the runs of a roster."""

    def __init__(self, witness: Witness, fleet: Fleet, roster: Roster) -> None:
        self.witness = witness
        self.fleet = fleet
        self.roster = roster

    def seat(self, run: Run, now: float) -> None:
        """Has a group come for a new run: under the plan that it asks for, or the first below that can be had.

        Raises:
            XditError: as `Fleet.want`, of the last plan that was tried.
        """
        problem = self._try(run, now)
        lacking = None if problem is None else self.below(run, "start", *problem[:2], now, problem[2])
        if lacking is not None:
            raise lacking

    def below(
        self, run: Run, when: str, code: Code | str, message: str, now: float, culprit: str = ""
    ) -> XditError | None:
        """Has a run that waits go on with less. None where it does; else why it cannot be served at all.

        Args:
            when: it failed, at its "start" or in a "turn"; with the code and the message, on the device `culprit`.
        """
        code = spell(code)
        batch = 1 if run.asked is None else batch_of(run.asked.work)
        while (lower := run.ladder.down(when, code, message, culprit, batch)) is not None:
            plan, run.ladder = lower
            keys = run.keys if plan == run.key.plan else (replace(run.key, plan=plan),)
            new = run.id not in self.roster
            if new:
                run.keys = keys
            else:
                self.roster.move(run, keys)
            run.untold = run.announced
            problem = self._try(run, now)
            if problem is None:
                self.fleet.unsettled = True
                if not new:  # of a new one is told when it is open
                    self.witness.degraded(run.ref, run.ladder.degraded, run)
                return None
            when, (code, message, culprit) = "start", problem
        return XditError(code, message)

    def _try(self, run: Run, now: float) -> tuple[str, str, str] | None:
        """Has one of its groups come, or returns code, sentence and device of why not.

        A plan that failed lately is not tried again where there is another below.
        """
        known = self.fleet.lately.problem(run.keys, now)
        if known is not None and run.ladder.leads_down("start", known[0]):
            return known
        large = [self.fleet.residency.too_large(run.found, key, run.lora_bytes) for key in run.keys]
        if run.lora_bytes and all(large):
            return Code.OUT_OF_MEMORY.value, f"{large[0]}.", ""
        try:
            self.fleet.want(run.keys, run.ref, run.found, now, run.ladder.degraded)
        except XditError as error:
            return spell(error.code), error.message, ""
        return None
