"""What becomes of a run that cannot go on as it was: it ends, waits for another group, or goes on with less. Pure.

The dispatcher says that something has happened to a run; here is the one place in which a run ends, and whoever waits
for that (`Run.due`, a drain) is answered.
"""

from __future__ import annotations

from collections.abc import Callable

from xditd.daemon.descent import Descent
from xditd.daemon.experience import Experience
from xditd.daemon.fleet import Fleet
from xditd.daemon.groups import Group
from xditd.daemon.ports import ClientPort, RankPort, Witness
from xditd.daemon.roster import Roster
from xditd.daemon.runs import MAX_REBINDS, Run
from xditd.daemon.turns import Turns
from xditd.daemon.work import batch_of, failed, spell
from xditd.protocol import messages as m
from xditd.protocol import orders as o
from xditd.protocol.errors import Code


class Ends:
    """The ends of the runs of a roster, and of their time on a group."""

    def __init__(
        self,
        clients: ClientPort,
        ranks: RankPort,
        witness: Witness,
        fleet: Fleet,
        roster: Roster,
        turns: Turns,
        descent: Descent,
        experience: Experience,
    ) -> None:
        self.clients = clients
        self.ranks = ranks
        self.witness = witness
        self.fleet = fleet
        self.roster = roster
        self.turns = turns
        self.descent = descent
        self.experience = experience
        self._drains: list[Callable[[], None]] = []  # to be called when no run is left

    def stop(self, run: Run, message: str, now: float) -> None:
        """Somebody wants it ended: it is now, or with the turn that it is in."""
        if self.turns.has(run.id):
            run.leaving = message
        else:
            self.end(run, Code.RUN_CANCELLED, message, now)

    def left(self, run: Run, now: float) -> bool:
        """A turn is over: whether its run was to end with it, and so has."""
        if run.leaving:
            self.end(run, Code.RUN_CANCELLED, run.leaving, now)
        return run.over

    def take_back(self, run: Run, group: Group, lost: bool, now: float) -> None:
        """The run's group failed: it waits for the next one, a limited number of times over one request."""
        if lost and run.asked is not None:
            run.rebinds += 1
            run.asked.rebinds += 0 if group.excused else 1
        if run.asked is not None and run.asked.rebinds > MAX_REBINDS:
            if self.lower(run, group, Code.RANK_LOST, group.problem, now):
                return
            message = f"Run {run.id} lost its group {run.asked.rebinds} times over one request; the last: {group.problem}."
            self.end(run, Code.RANK_LOST, message, now)
            return
        self.roster.take_back(run)

    def lower(self, run: Run, group: Group, code: Code | str, problem: str, now: float) -> bool:
        """A turn of the run, on this group, failed for good: whether it goes on with less, or has ended for want of it."""
        assert run.asked is not None
        if not run.ladder.leads_down("turn", spell(code), batch_of(run.asked.work)):
            return False
        run.asked.rebinds = 0
        self.roster.take_back(run)
        if group.state == "ready":  # it serves on, without this run
            self.ranks.order(group, o.ForgetRun(run=run.id))
        self.descend(run, "turn", code, problem, group, now)
        return True

    def descend(self, run: Run, when: str, code: Code | str, problem: str, group: Group, now: float) -> None:
        """A run that waits goes on with less than what failed on the group, at its "start" or in a "turn"; or it ends."""
        lacking = self.descent.below(run, when, code, problem, now, group.culprit)
        if lacking is not None:
            self.end(run, lacking.code, lacking.message, now)

    def end(self, run: Run, code: Code | str, message: str, now: float) -> None:
        """The one end of a run: what is under way is answered, and its group forgets it."""
        if run.over:
            return
        self.turns.forget(run.id)
        self.roster.end(run)
        run.code, run.problem = spell(code), message
        if not run.announced:
            self.clients.answer(run.peer, failed(run.reopen, code, message))
        elif run.asked is not None:
            self.clients.answer(run.peer, failed(run.asked.work.id, code, message))
        elif code != Code.RUN_CANCELLED:
            self.clients.answer(run.peer, m.RunEnded(run=run.id, code=spell(code), message=message))
        run.asked = None
        run.conditioning.clear()
        group = self.fleet.groups.get(run.group)
        if group is not None and group.state == "ready":
            self.ranks.order(group, o.ForgetRun(run=run.id))
            self.experience.run(group.key, now - run.placed)
            group.used = now
        self.fleet.unsettled = True
        self.witness.run_ended(run)
        for peer, answer in run.due:
            self.clients.answer(peer, answer)
        self._look_who_drains()

    def drain(self, then: Callable[[], None]) -> None:
        """Nothing new is taken: `then` is called once, as soon as no run is left."""
        self._drains.append(then)
        self._look_who_drains()

    def _look_who_drains(self) -> None:
        if not self.roster:
            drained, self._drains = self._drains, []
            for then in drained:
                then()
