"""xditd itself: a client, the real daemon, and one CPU rank that does no work (the family "echo")."""

from __future__ import annotations

from contextlib import ExitStack

import torch

from bench.daemon import serving
from bench.handoff.payloads import PAYLOADS
from xditd.client import Client, Run
from xditd.protocol.messages import ModelRef

ECHO = ModelRef(kind="echo", name="echo")
IMAGES = ModelRef(kind="echo", name="echo", dtype="float16")
"""Another dtype is another group: a VAE is a rank of its own too."""

SIGMA = 0.5


class Xditd:
    name = "xditd"
    says = "xditd.client through the daemon to an echo rank; M puts conditioning in a new run and denoises, XL decodes"
    payloads = tuple(PAYLOADS)

    def start(self) -> None:
        self._stack = ExitStack()
        endpoint = self._stack.enter_context(
            serving(debug__echo=True, devices__kind="cpu", devices__cpu_ranks=1, devices__threads=1)
        )
        self._client = self._stack.enter_context(Client(endpoint, name="bench", timeout=60))
        self._run: Run = self._stack.enter_context(self._client.open_run(ECHO))
        self._run.put_conditioning("bare", {})
        self._job: Run = self._client.open_run(ECHO)
        self._stack.callback(lambda: self._job.close())
        self._vae: Run = self._stack.enter_context(self._client.open_run(IMAGES))

    def prepare(self, payload: str) -> None:
        """A job has a run of its own, and the former has ended; S and XL go on in theirs."""
        if payload == "M":
            self._job.close()
            self._job = self._client.open_run(ECHO)

    def once(self, payload: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if payload == "S":
            return self._run.denoise([(inputs["x"], SIGMA, "bare")])[0]
        if payload == "XL":
            return self._vae.decode(inputs["latent"])
        if payload == "M":
            conditioning = {name: inputs[name] for name in ("context", "pooled")}
            self._job.put_conditioning("job", conditioning, wait=False)
        return self._job.denoise([(inputs["x"], SIGMA, "job")])[0]

    def stop(self) -> None:
        self._stack.close()
