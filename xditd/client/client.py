"""A client of one daemon: what a program holds. It knows requests and answers, no sockets and no slots."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from xditd.client.run import Run
from xditd.protocol.messages import (
    Limits,
    Loaded,
    ModelList,
    ModelRef,
    PlanRequest,
    Progress,
    Queued,
    Rebound,
    StatusReport,
    Unloaded,
)

if TYPE_CHECKING:
    import torch

Event = Queued | Rebound | Progress
OnEvent = Callable[[Event], None]
Interrupt = Callable[[], None]


class Client:
    """A connection to a daemon that outlives the daemon: after a restart the next request connects anew.

    Blocking; every method may be called from any thread. A context manager.

    Args:
        endpoint: `ipc:///path` or `tcp://host:port`; None looks at `XDITD_ENDPOINT`, the user's socket and the
            system's.
        name: for people who read `xditctl status`: "ComfyUI 0.3.64".
        shared_memory: with False, tensors travel as frames, as they do over tcp. A program that sends no tensors
            saves the daemon an arena with it.
        timeout: seconds to wait for a daemon, and for answers that need no model. 0 tries once.

    Raises:
        XditError: `daemon_not_found` naming every endpoint tried, `unsupported_version`, `bad_value` for an endpoint
            that is none.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        name: str = "",
        shared_memory: bool = True,
        timeout: float = 30.0,
    ) -> None:
        raise NotImplementedError

    epoch: str
    capabilities: tuple[str, ...]
    limits: Limits
    daemon_version: str

    def status(self) -> StatusReport:
        """The daemon, its devices, groups, runs and arenas."""
        raise NotImplementedError

    def models(self, kind: str = "") -> ModelList:
        """The files that the daemon can load, of a kind ("" is every kind)."""
        raise NotImplementedError

    def load(
        self,
        model: ModelRef | str,
        plan: PlanRequest | None = None,
        *,
        on_event: OnEvent | None = None,
        interrupt: Interrupt | None = None,
        timeout: float | None = None,
    ) -> Loaded:
        """Has the model ready under the plan; returns when it is."""
        raise NotImplementedError

    def unload(
        self, model: ModelRef | str | None = None, *, group: str = "", force: bool = False
    ) -> Unloaded:
        """Ends the groups of a model, or the one named."""
        raise NotImplementedError

    def open_run(
        self,
        model: ModelRef | str,
        plan: PlanRequest | None = None,
        *,
        label: str = "",
        on_event: OnEvent | None = None,
        interrupt: Interrupt | None = None,
        timeout: float | None = None,
    ) -> Run:
        """Queues a run and returns it when it is bound to a ready group."""
        raise NotImplementedError

    def decode(
        self,
        vae_model: ModelRef | str,
        latent: torch.Tensor,
        plan: PlanRequest | None = None,
        *,
        on_event: OnEvent | None = None,
        interrupt: Interrupt | None = None,
        timeout: float | None = None,
    ) -> torch.Tensor:
        """Latent [B, C, h, w], unscaled, to image [B, H, W, 3] float32 in 0..1: a run of one turn."""
        raise NotImplementedError

    def encode(
        self,
        vae_model: ModelRef | str,
        image: torch.Tensor,
        plan: PlanRequest | None = None,
        *,
        on_event: OnEvent | None = None,
        interrupt: Interrupt | None = None,
        timeout: float | None = None,
    ) -> torch.Tensor:
        """Image [B, H, W, 3] in 0..1 to latent [B, C, h, w], unscaled: a run of one turn."""
        raise NotImplementedError

    def cancel(self, run_id: int) -> None:
        """Ends a run, also another client's: at once if it waits, after the step it is in otherwise."""
        raise NotImplementedError

    def drain(self, stop: bool = False, timeout: float | None = None) -> None:
        """Has the daemon take no new runs; returns when the open ones have ended. With `stop` it then ends."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the connection; the daemon ends its runs and frees its arena. Results that live stay readable."""
        raise NotImplementedError

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
