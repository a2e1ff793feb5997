"""What the daemon's parts say of themselves as it happens, passed on to whoever looks: the chronicle and the metrics.

The parts call it and decide nothing by it; it changes nothing of theirs. To the core it is the witness (`ports`).
"""

from __future__ import annotations

import logging

from xditd.daemon.chronicle import Chronicle
from xditd.daemon.groups import Group
from xditd.daemon.metrics import Metrics
from xditd.daemon.ports import Witness
from xditd.daemon.runs import Asked, Run
from xditd.daemon.session import Session
from xditd.protocol.errors import Code
from xditd.protocol.plans import ModelRef

log = logging.getLogger("xditd.sight")


class Sight(Witness):
    """The one place that hears of everything."""

    def __init__(self, chronicle: Chronicle, metrics: Metrics | None = None) -> None:
        """
        Args:
            metrics: None where nobody scrapes: then nothing is counted.
        """
        self.chronicle = chronicle
        self.metrics = metrics
        self._state = ""

    def daemon(self, state: str) -> None:
        """The daemon's state, as often as somebody says it."""
        if state != self._state:
            self._state = state
            self.chronicle.tell(state)

    def client(self, session: Session, event: str) -> None:
        """A client has come ("connected") or gone ("gone")."""
        self.chronicle.tell(f"client_{event}", client=session.name)

    def group_changed(self, group: Group) -> None:
        broken = group.state == "failed"
        self.chronicle.tell(
            f"group_{group.state}",
            group=group.name,
            generation=group.generation,
            model=group.ref,
            code=group.code if broken else "",
            message=group.problem if broken else "",
        )
        if self.metrics is not None:
            self.metrics.group(group)

    def degraded(self, ref: ModelRef, why: str, run: Run | None) -> None:
        what = "load" if run is None else "run"
        facts = {} if run is None else {"run": run.id, "client": run.client}
        self.chronicle.tell(f"{what}_degraded", model=ref, message=why, **facts)
        log.warning(
            "Degraded: %s: %s.",
            ref.name,
            why.rstrip("."),
            extra={k: v for k, v in facts.items() if k == "run"},
        )

    def run_opened(self, run: Run) -> None:
        self.chronicle.tell("run_opened", run=run.id, model=run.ref, client=run.client)

    def run_ended(self, run: Run) -> None:
        """One that its client closed has no code."""
        closed = run.closing and run.code == Code.RUN_CANCELLED.value
        code, message = ("", "") if closed else (run.code, run.problem)
        self.chronicle.tell(
            "run_ended", run=run.id, model=run.ref, client=run.client, code=code, message=message
        )
        if self.metrics is not None:
            self.metrics.run_ended(code)

    def turn_done(self, asked: Asked, seconds: float) -> None:
        if self.metrics is not None:
            self.metrics.turn(asked.work, seconds)
