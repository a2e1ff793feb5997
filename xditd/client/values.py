"""What a program gives and gets: torch tensors or Buffers, and which of the two is seen here alone."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar, Union

from xditd.client.buffers import Buffer, Source

if TYPE_CHECKING:
    import torch

T = TypeVar("T", bound="Union[torch.Tensor, Buffer]")


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
