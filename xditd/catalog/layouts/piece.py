"""Where a parameter of diffusers' module comes from in a file of the model's makers. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """Where a parameter comes from.

    Attributes:
        key: of the file's tensor.
        rows: of its first dimension, from and up to; None is all.
        swapped: the halves of the first dimension change places.
        squeezed: dimensions after the second are dropped, all of size 1 (a 1×1 convolution is a linear layer).
    """

    key: str
    rows: tuple[int, int] | None = None
    swapped: bool = False
    squeezed: bool = False

    def shape(self, of: tuple[int, ...]) -> tuple[int, ...]:
        """The parameter's shape, where the file's tensor has shape `of`."""
        first = of[0] if self.rows is None else max(0, min(self.rows[1], of[0]) - self.rows[0])
        rest = of[1:2] if self.squeezed and all(size == 1 for size in of[2:]) else of[1:]
        return (first, *rest)
