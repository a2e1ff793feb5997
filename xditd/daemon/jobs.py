"""The requests that are under way: each gets its turns, one after the other, and is answered once.

A run that has a place on a group asks for one thing at a time. `turns` says whose turn it is; here the turn goes out
to the ranks as an order (`work`), and what they report becomes the next turn, or the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xditd.daemon.groups import Group
from xditd.daemon.ports import ClientPort, RankPort, Witness
from xditd.daemon.roster import Roster
from xditd.daemon.runs import Asked, Run, Work
from xditd.daemon.turns import Turns
from xditd.daemon.work import alone, answer, batch_of, begin, effort, failed, progress, turn
from xditd.protocol import messages as m
from xditd.protocol import orders as o
from xditd.protocol.errors import Code, XditError


class Jobs:
    """What the runs of a roster are asked."""

    def __init__(
        self,
        clients: ClientPort,
        ranks: RankPort,
        witness: Witness,
        roster: Roster,
        groups: Mapping[str, Group],
        turns: Turns,
    ) -> None:
        self.clients = clients
        self.ranks = ranks
        self.witness = witness
        self.roster = roster
        self.groups = groups
        self.turns = turns

    def ask(self, run: Run, work: Work, frames: Sequence[Any], now: float) -> None:
        """A run is asked something. One without a place keeps it until it has one.

        Raises:
            XditError: `run_busy` if something is under way.
        """
        if run.asked is not None:
            raise XditError(
                Code.RUN_BUSY,
                f"Run {run.id} is at work on request {run.asked.work.id}; ask one thing at a time.",
            )
        run.touched = now
        run.asked = Asked(work, frames)
        run.effort = effort(work)
        if run.state == "bound":
            run.go("ask")
            self._ask_turn(run)
            self.next_turns(now)

    def begin_anew(self, run: Run) -> None:
        """A run that was asked something has a place, its first or another one."""
        assert run.asked is not None
        run.asked.begin_anew()
        run.go("ask")
        self._ask_turn(run)

    def next_turns(self, now: float) -> None:
        """Gives every turn that can be given."""
        while (run_id := self.turns.next()) is not None:
            self._give_turn(self.roster[run_id], now)

    def turn_over(self, group: Group, number: int | None, now: float) -> Run | None:
        """A turn has ended, however: the devices are free. Returns its run; None where either is over already."""
        run_id = self.turns.over(group, number, now)
        return self.roster.get(run_id) if run_id is not None else None

    def advance(self, run: Run, asked: Asked, report: o.TurnDone, frames: Sequence[Any], now: float) -> None:
        """One more turn of what the run was asked is done: the next, or the answer."""
        run.touched = now
        asked.step += 1
        asked.seconds += report.seconds
        self.witness.turn_done(asked, report.seconds)
        finished = asked.step == asked.turns
        if isinstance(asked.work, m.Sample):
            preview, shown = alone(report.preview, frames) if report.preview is not None else (None, ())
            self.clients.answer(run.peer, progress(run.id, asked, asked.work, preview), shown)
        if finished:
            run.asked = None
            run.go("answer")
            why = "; ".join(filter(None, (run.ladder.degraded, report.degraded)))
            if report.degraded:
                self.witness.degraded(run.ref, why, run)
            self.clients.answer(run.peer, *answer(asked, report, frames, why))
        else:
            self._ask_turn(run)

    def refuse(self, run: Run, asked: Asked, code: str, message: str, now: float) -> None:
        """What the run was asked has failed; the run itself goes on."""
        run.asked = None
        run.go("answer")
        run.touched = now
        self.clients.answer(run.peer, failed(asked.work.id, code, message))

    # -------------------------------------------------------------------------------------------- inside

    def _ask_turn(self, run: Run) -> None:
        self.turns.ask(run.id, run.peer, self.groups[run.group], run.priority)

    def _give_turn(self, run: Run, now: float) -> None:
        group, asked = self.groups[run.group], run.asked
        assert asked is not None
        number = self.turns.begin(run.id, group, now)
        frames = () if asked.begun else asked.frames
        if isinstance(asked.work, m.Sample) and not asked.begun:
            self.ranks.order(
                group, begin(run.id, asked.work, run.ladder.singly), peer=run.peer, frames=frames
            )
            frames = ()
        asked.begun = True
        tiles = run.ladder.at_foot(batch_of(asked.work)) and len(group.key.plan.devices) == 1
        self.ranks.order(
            group, turn(number, run.id, asked, run.ladder.singly, tiles), peer=run.peer, frames=frames
        )
