"""What a program gives and gets: torch tensors or Buffers, told apart here alone, and timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar, Union

from xditd.client.buffers import Buffer, Source

if TYPE_CHECKING:
    import torch

T = TypeVar("T", bound="Union[torch.Tensor, Buffer]")
Times = Union[float, Sequence[float]]


def source(tensor: Any) -> Source:
    """The tensor, ready to be written to a slot or a frame."""
    return tensor if isinstance(tensor, Buffer) else with_torch().TensorSource(tensor)


def like(given: T, result: Buffer) -> Any:
    """The result as the kind of thing that was given."""
    return result if isinstance(given, Buffer) else with_torch().read(result)


@lru_cache(maxsize=1)
def with_torch() -> Any:
    """The module that imports torch: not before a tensor comes, and looked up once."""
    from xditd.client import tensors

    return tensors


def times(t: Any) -> tuple[float, ...]:
    """A number, a sequence of them or a tensor, as a tuple."""
    if hasattr(t, "tolist"):
        t = t.tolist()
    return (float(t),) if isinstance(t, (int, float)) else tuple(float(value) for value in t)
