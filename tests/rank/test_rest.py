"""A rank that is put to sleep and woken (what that does to real weights: `tests/models/test_weights.py`, `tests/live/test_sleep.py`)."""

from __future__ import annotations

from pathlib import Path

from tests.rank.ranks import running
from xditd.protocol import orders


def test_a_rank_that_cannot_wake_says_so_and_ends(tmp_path: Path) -> None:
    """Even where it could go on: nobody knows where its weights are."""
    with running(tmp_path, family="echo", options={"fail_at_wake": "yes"}) as ranks:
        ranks.send(orders.Sleep())
        assert ranks.wait(orders.RankRested)[0].asleep
        ranks.send(orders.Wake())
        failed, _ = ranks.wait(orders.RankFailed)
        assert (failed.code, failed.order, failed.alive) == ("rank_failed", None, False)
        assert ranks.codes() == [1]
