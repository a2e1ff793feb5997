"""One sampling of ComfyUI's as the daemon sees it: a run, its conditionings, its calls and its end.

The run is opened at the first call. A step keeps nothing in the ranks, so a daemon that was restarted on the way
costs the time until it is back, and not the image.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from xditd.client import Run
from xditd.protocol import messages as m
from xditd.protocol.errors import Code, XditError

from . import daemon
from .dispatcher import Dispatcher
from .joint import Joint
from .say import say

log = logging.getLogger("xditd.nodes")

T = TypeVar("T")

LOST = (Code.RUN_LOST, Code.DAEMON_LOST, Code.HELLO_REQUIRED, Code.STOPPING)
"""Codes of a run that went with its daemon."""


class Item(NamedTuple):
    """One conditioning's share of a call of the diffusion model.

    Attributes:
        x: [B, C, H, W], t: [B], as the diffusion model gets them.
        key: of the conditioning.
    """

    x: torch.Tensor
    t: torch.Tensor
    key: str


class Put(NamedTuple):
    """A conditioning that the run has under a key."""

    tensors: dict[str, torch.Tensor]
    values: dict[str, float]


class Sampling:
    """The run of one sampling.

    Attributes:
        joint: the calls of one of its steps, asked together.
        calls: turns that it asked for.
        remarks: what went another way than planned, for people.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        self.joint = Joint(self.denoise)
        self.calls = 0
        self.remarks: list[str] = []
        self._plan = ""
        self._tell = daemon.telling(dispatcher.model.name)
        self._run: Run | None = None
        self._was_there = False
        self._puts: dict[str, Put] = {}
        self._versions: dict[str, int] = {}

    @property
    def run(self) -> Run:
        """The run, opened where it is not."""
        if self._run is None:
            self._run = daemon.patiently(self._open) if self._was_there else self._open()
            self._was_there = True
            loras = "".join(f", {match.name} × {match.strength:g}" for match in self._run.lora)
            if self._run.degraded and not any(self._run.degraded in remark for remark in self.remarks):
                self.remarks.append(f"degraded: {self._run.degraded}")
            self._plan = f"{', '.join(self._run.plan.devices)} ({self._run.plan.reason}){loras}"
        return self._run

    def key(self, name: str, tensors: dict[str, torch.Tensor], values: dict[str, float], known: bool) -> str:
        """The key of a conditioning, which is put where the run has it not.

        Args:
            name: the same for the same conditioning, step after step.
            known: that the contents under the name are the last ones' is known; else they are compared.
        """
        key = f"{name}.{self._versions.get(name, 0)}"
        put = self._puts.get(key)
        if put is not None and (known or _same(put, tensors, values)):
            return key
        if put is not None:  # somebody has changed it between two steps
            del self._puts[key]
            self._versions[name] = self._versions.get(name, 0) + 1
            key = f"{name}.{self._versions[name]}"
        kept = Put({label: tensor.detach().cpu().clone() for label, tensor in tensors.items()}, values)
        self._puts[key] = kept
        self._again(lambda: self.run.put_conditioning(key, kept.tensors, kept.values, wait=False))
        return key

    def denoise(self, items: Sequence[Item]) -> list[torch.Tensor]:
        """The network's raw output for every item, in one turn; on the devices of their x."""
        asked = [(item.x, item.t.tolist(), item.key) for item in items]
        outputs = self._again(lambda: self.run.denoise(asked, interrupt=daemon.interrupt))
        self.calls += 1
        return [output.to(item.x.device) for output, item in zip(outputs, items, strict=True)]

    def sample(self, ask: Callable[[Run], T]) -> T:
        """Has the run do a whole loop; from its beginning again where the daemon was restarted."""
        result = self._again(lambda: ask(self.run))
        self.calls += 1
        return result

    def close(self, failed: bool) -> None:
        """Ends the run. What cannot be told to the daemon any more has ended there, too."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.cancel() if failed else run.close()
        except XditError as error:
            log.warning("Run %d could not be closed: %s", run.id, error.message)

    def verdict(self) -> str:
        """How it went, in one line for people."""
        if not self.calls:
            return "✅ no step needed the model"
        return f"⚠️ {self._plan}; {'; '.join(self.remarks)}" if self.remarks else f"✅ {self._plan}"

    def _open(self) -> Run:
        spec = self.dispatcher
        return daemon.client(spec.endpoint).open_run(
            spec.model,
            spec.plan,
            label="KSampler",
            lora=spec.lora,
            on_event=self._hear,
            interrupt=daemon.interrupt,
        )

    def _hear(self, event: Any) -> None:
        self._tell(event)
        if isinstance(event, m.Rebound):
            self.remarks.append(f"{event.reason}; {event.group} went on")

    def _again(self, ask: Callable[[], T]) -> T:
        """Asks, and where the daemon was lost on the way, asks its successor once."""
        try:
            return ask()
        except XditError as error:
            if not self._was_there or error.code not in LOST:
                raise
            log.warning("The daemon was lost in mid-sampling: %s", error.message)
        self.remarks.append("the daemon was restarted on the way")
        say("⚠️ the daemon was restarted; the sampling goes on where it was")
        self._run = None
        for key, kept in self._puts.items():
            self.run.put_conditioning(key, kept.tensors, kept.values)
        return ask()


def _same(put: Put, tensors: dict[str, torch.Tensor], values: dict[str, float]) -> bool:
    return (
        put.values == values
        and put.tensors.keys() == tensors.keys()
        and all(
            tensor.shape == put.tensors[name].shape and torch.equal(tensor.cpu(), put.tensors[name])
            for name, tensor in tensors.items()
        )
    )
