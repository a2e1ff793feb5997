"""Conditioning holds its shared memory for as long as a rank may read it, and no longer."""

from __future__ import annotations

import pytest
import torch

from tests.client.fake_daemon import FakeDaemon
from tests.client.test_client import MODEL, in_use, x
from xditd.client import Client
from xditd.protocol import messages as m
from xditd.protocol.errors import Code, XditError

CONTEXT = torch.zeros(1, 64, 32)


def test_conditioning_that_was_put_anew_is_given_back_after_the_next_step(sharing: Client) -> None:
    with sharing.open_run(MODEL) as run:
        run.put_conditioning("c", {"context": CONTEXT})
        once = in_use(sharing)
        for _ in range(5):
            run.put_conditioning("c", {"context": CONTEXT})
            assert in_use(sharing) == 2 * once  # the rank may not have read the former yet
            run.denoise([(x(), 0.0, "c")])
            assert in_use(sharing) == once
    assert in_use(sharing) == 0


def test_conditioning_that_no_step_followed_is_held_to_the_end(sharing: Client) -> None:
    with sharing.open_run(MODEL) as run:
        for _ in range(5):
            run.put_conditioning("c", {"context": CONTEXT})
        run.put_conditioning("other", {"context": CONTEXT})
        held = in_use(sharing)
        run.denoise([(x(), 0.0, "other")])
        assert in_use(sharing) == held // 3  # "c" and "other" as they are now
    assert in_use(sharing) == 0


def test_a_refusal_that_was_not_waited_for_is_raised_by_the_next_step(
    daemon: FakeDaemon, client: Client
) -> None:
    """And that step returns nothing: it may have been done with the conditioning that was there before."""
    with client.open_run(MODEL) as run:
        run.put_conditioning("c", {"context": CONTEXT})
        daemon.hold.add("put_conditioning")
        run.put_conditioning("c", {"context": CONTEXT}, wait=False)
        _, asked = daemon.wait_for("put_conditioning", 2)
        daemon.say(m.Failed(re=asked.id, code="bad_tensor", message="too long"))
        with pytest.raises(XditError, match="too long") as refusal:
            run.denoise([(x(), 0.0, "c")])
        assert refusal.value.code == Code.BAD_TENSOR
        (got,) = run.denoise([(x(), 0.0, "c")])
        del got
    assert in_use(client) == 0
