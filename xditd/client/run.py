"""One run of a client: its conditioning, its steps and its end. It knows the messages of a run, no sockets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from xditd.protocol.messages import ModelInfo, Plan

if TYPE_CHECKING:
    import torch


class Run:
    """A run that is bound to a group. Made by `Client.open_run`; a context manager that closes it.

    Results are views of shared memory: they cost no copy, and their slot is used again when the last view of a
    result is gone. Clone what must outlive many steps.

    Attributes:
        id: its number in this life of the daemon.
        group: the group that it is bound to; another one after a `Rebound`.
        plan: how that group runs the model.
        model: what the daemon found the file to be.
    """

    id: int
    group: str
    plan: Plan
    model: ModelInfo

    def put_conditioning(
        self, key: str, tensors: Mapping[str, torch.Tensor], values: Mapping[str, float] = {}
    ) -> None:
        """Gives the run a conditioning under a key, once for all its steps."""
        raise NotImplementedError

    def denoise(
        self,
        items: Sequence[tuple[torch.Tensor, Any, str]],
        *,
        interrupt: Callable[[], None] | None = None,
    ) -> list[torch.Tensor]:
        """One turn: a prediction, shaped as x, for each (x, t, conditioning key). t: a number, or one per batch."""
        raise NotImplementedError

    def sample(
        self,
        noise: torch.Tensor,
        sigmas: Any,
        conditioning: str,
        *,
        sampler: str = "euler",
        negative: str | None = None,
        cfg: float = 1.0,
        latent: torch.Tensor | None = None,
        callback: Callable[[int, int, float, torch.Tensor | None], None] | None = None,
        previews: bool = True,
        interrupt: Callable[[], None] | None = None,
    ) -> torch.Tensor:
        """The whole sampling loop in the ranks. callback(step, total, sigma, x0 or None) after every step."""
        raise NotImplementedError

    def decode(self, latent: torch.Tensor, *, interrupt: Callable[[], None] | None = None) -> torch.Tensor:
        """Latent [B, C, h, w], unscaled, to image [B, H, W, 3] float32 in 0..1."""
        raise NotImplementedError

    def encode(self, image: torch.Tensor, *, interrupt: Callable[[], None] | None = None) -> torch.Tensor:
        """Image [B, H, W, 3] in 0..1 to latent [B, C, h, w], unscaled."""
        raise NotImplementedError

    def cancel(self) -> None:
        """Ends the run: after the step it is in, if it is in one."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the run when it has nothing under way and frees its conditioning."""
        raise NotImplementedError

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        raise NotImplementedError
