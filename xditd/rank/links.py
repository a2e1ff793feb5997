"""How the stages of a pipeline pass tensors on: to the next, and from the last back to the first. In order, never waiting.

Each direction between two ranks has a group, and so with NCCL a communicator and a stream, of its own: a receive that
waits for the last stage does not hold up what the first sends. Shapes are known on both sides; nothing is negotiated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed


class Arriving(NamedTuple):
    """A tensor that is on its way here."""

    tensor: torch.Tensor
    work: Any

    def wait(self) -> torch.Tensor:
        self.work.wait()
        return self.tensor


class Links:
    """This rank's ends. Made by all ranks of a world at once.

    Args:
        stages: of a pipeline, which are neighbours: ranks 0 … stages - 1 are the first pipeline.
        rank, world: of this process; torch.distributed is joined.
        device: where tensors arrive.

    Attributes:
        stage: which of its pipeline this rank is.
        pipeline: which pipeline it is in, of `pipelines`.
        lasts: torch.distributed's group of all pipelines' last stages; None where this is none.
    """

    def __init__(self, stages: int, rank: int, world: int, device: torch.device) -> None:
        self.stages = stages
        self.pipelines = world // stages
        self.pipeline, self.stage = divmod(rank, stages)
        self._device = device
        self._sent: list[
            tuple[Any, torch.Tensor]
        ] = []  # in this turn; what is sent must be held until it is gone
        self._sent_before: list[tuple[Any, torch.Tensor]] = []
        self._onward: Any = None
        self._inward: Any = None
        for first in range(0, world, stages):
            for stage in range(stages):  # every rank makes every group, also those that it is not in
                source, target = first + stage, first + (stage + 1) % stages
                group = torch.distributed.new_group([source, target])
                if rank == source:
                    self._onward = (group, target)
                if rank == target:
                    self._inward = (group, source)
        lasts = list(range(stages - 1, world, stages))
        made = torch.distributed.new_group(lasts) if len(lasts) > 1 else None
        self.lasts: Any = made if rank in lasts else None

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.stages - 1

    def begin_turn(self) -> None:
        """Lets go of what was sent in the turn before the last one.

        It is waited for, since with gloo a send is never known to be completed until then. Nobody waits for anybody in a
        circle: what a stage needs to receive of an earlier turn has all been sent.
        """
        for work, _ in self._sent_before:
            work.wait()
        self._sent_before, self._sent = self._sent, []

    def send(self, tensor: torch.Tensor) -> None:
        """To the next stage; the last one's next is the first. Does not wait for it."""
        group, target = self._onward
        tensor = tensor.contiguous()
        self._sent.append((torch.distributed.isend(tensor, target, group=group), tensor))

    def arriving(self, shape: tuple[int, ...], dtype: torch.dtype) -> Arriving:
        """What the stage before sends next that was not asked for yet."""
        group, source = self._inward
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        return Arriving(tensor, torch.distributed.irecv(tensor, source, group=group))
