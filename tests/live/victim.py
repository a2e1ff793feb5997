"""A client that a test kills: it samples on the daemon named by its argument and says when it is in the middle.

Without torch, so that two hundred of them start quickly.
"""

from __future__ import annotations

import sys
from typing import Any

from xditd.client import Client
from xditd.client.buffers import Buffer
from xditd.protocol.messages import PlanRequest

SHAPE = (1, 16, 64, 64)
x: Any = Buffer(bytearray(4 * 16 * 64 * 64), "float32", SHAPE)

with (
    Client(sys.argv[1], name="victim") as client,
    client.open_run("echo/echo", PlanRequest(devices=("0",))) as run,
):
    run.put_conditioning("c", {"context": x})
    sigmas = [1 - i / 4000 for i in range(4000)] + [0.0]
    run.sample(x, sigmas, "c", callback=lambda *step: print(step[0], flush=True))
