"""How long each phase may take, and who is over it. Knows no clock."""

from __future__ import annotations

from dataclasses import dataclass

from xditd.daemon.groups import Group


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Seconds that each phase may take. The first turn may compile."""

    load: float
    first_turn: float
    turn: float
    leave: float
    run_idle: float
    queued: float = 86400.0

    def overdue(self, group: Group, now: float) -> str:
        """What a group that starts, wakes, goes to sleep or is in a turn has been at for too long; "" where it has not."""
        if group.state in ("starting", "dozing", "waking") and now - group.started > self.load:
            return f"It was not ready within {self.load:g} s (deadlines.load): still {group.phase}"
        if group.state == "ready" and group.turn is not None:
            which, allowed = ("turn", self.turn) if group.turns else ("first_turn", self.first_turn)
            if now - group.turn_since > allowed:
                return f"A turn took longer than {allowed:g} s (deadlines.{which}): a rank hangs"
        return ""
