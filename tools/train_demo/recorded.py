"""A step of training, recorded once as a CUDA graph and then started as a whole.

The networks are small: starting a step's thousands of kernels one by one takes longer than the kernels do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

WARM = 3  # times that a step is done before it is recorded: compiles, and makes what optimisers remember


class Recorded:
    """A step that does the same whenever it is called: what changes (a learning rate) it reads from tensors.

    Args:
        step: from lesson to weights. It must wait for nothing that the device computes.
        parameters: whose gradients are the recording's own.
        record: else every kernel is started by itself, as ever on a CPU.
    """

    def __init__(self, step: Callable[[], None], parameters: Iterable[nn.Parameter], record: bool) -> None:
        self._step, self._parameters, self._record = step, list(parameters), record
        self._times = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        self._times += 1
        if self._graph is None:
            for parameter in self._parameters:
                parameter.grad = None
        if not self._record:
            self._step()
        elif self._times <= WARM:
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                self._step()
            torch.cuda.current_stream().wait_stream(aside)
        else:
            if self._graph is None:
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph):
                    self._step()
            self._graph.replay()
