"""The two that are compared: the module called in this process, and the same step through client and daemon.

Each has `step(x)`, which returns when the prediction is there: on the device for the bare call, in the client's hands
for the others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from xditd.client import Run
from xditd.models import families
from xditd.rank import attention

SIGMA = 0.6
GUIDANCE = 3.5
KEY = "prompt"


class Contender(Protocol):
    name: str

    def step(self, x: torch.Tensor) -> torch.Tensor:
        """One step of a latent that lies on the CPU; its prediction."""


class Bare:
    """The network as a single-device rank has it, without any rank.

    Args:
        path: of the model file.
        inputs: with `context` and `pooled`, on the CPU.
        compiled: whether its blocks are compiled, as `compute.compile` has it.
    """

    name = "bare forward"

    def __init__(
        self,
        path: Path,
        dtype: torch.dtype,
        device: torch.device,
        inputs: dict[str, torch.Tensor],
        compiled: bool,
    ) -> None:
        torch.set_grad_enabled(False)
        self.device = device
        self.kernel = attention.choose(device, dtype)
        self.network: Any = families.load("flux", path, "transformer", device, dtype)
        # As xditd.rank.loading does for a world of one.
        self.network.backbone.set_attention_backend(self.kernel.diffusers)
        if compiled:
            self.network.backbone.compile_repeated_blocks(fullgraph=True, dynamic=True)
        conditioning = {name: inputs[name].to(device) for name in ("context", "pooled")}
        self._conditioning = self.network.condition(conditioning, {"guidance": GUIDANCE})
        self._sigma = torch.tensor([SIGMA], device=device)
        self._resident: dict[int, torch.Tensor] = {}

    def settle(self, x: torch.Tensor) -> None:
        """Has x on the device before it is timed: the headline's bare call copies nothing."""
        self._resident = {id(x): x.to(self.device)}
        self._synchronize()

    def step(self, x: torch.Tensor) -> torch.Tensor:
        prediction = self.predict(self._resident[id(x)])
        self._synchronize()
        return prediction

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        return self.network.predict(x, self._sigma, self._conditioning)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class BareWithCopies:
    """The bare call with what any caller pays who has the latent on the host: there and back."""

    name = "bare + copies"

    def __init__(self, bare: Bare) -> None:
        self._bare = bare

    def step(self, x: torch.Tensor) -> torch.Tensor:
        return self._bare.predict(x.to(self._bare.device)).cpu()


class Daemon:
    """A run of a client, whose conditioning was put before."""

    name = "through xditd"

    def __init__(self, run: Run, inputs: dict[str, torch.Tensor]) -> None:
        self._run = run
        run.put_conditioning(
            KEY, {name: inputs[name] for name in ("context", "pooled")}, {"guidance": GUIDANCE}
        )

    def step(self, x: torch.Tensor) -> torch.Tensor:
        return self._run.denoise([(x, SIGMA, KEY)])[0]
