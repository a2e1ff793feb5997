"""A client that a test kills: it samples on the daemon named by its argument and says when it is in the middle."""

from __future__ import annotations

import sys

import torch

from xditd.client import Client
from xditd.protocol.messages import PlanRequest

X = torch.zeros(1, 16, 64, 64)

with (
    Client(sys.argv[1], name="victim") as client,
    client.open_run("echo/echo", PlanRequest(devices=("0",))) as run,
):
    run.put_conditioning("c", {"context": X})
    sigmas = [1 - i / 4000 for i in range(4000)] + [0.0]
    run.sample(X, sigmas, "c", callback=lambda *step: print(step[0], flush=True))
