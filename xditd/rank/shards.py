"""How tokens are dealt out to the ranks of a sequence-parallel world. Arithmetic only: no torch, no xfuser.

Text and image are each dealt out in order, as evenly as can be, and each rank's share is padded to the largest: so
all ranks hold equally many tokens, which collectives need, whatever the totals. The world is a grid of ring ×
ulysses, rank = ring rank · ulysses + ulysses rank. Before attention, the ulysses ranks of one ring rank exchange
heads for tokens: that ring rank's *block* then has the shares of all of them, one after another, pads among them.
`valid` says where in a block the tokens are that are no pads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from xditd.protocol.errors import Code, XditError

Kinds = tuple[str, ...]
"""Of "text" and "image", those that an attention has as keys, in the order in which a rank's share has them."""

JOINT: Kinds = ("text", "image")


@dataclass(frozen=True, slots=True)
class Shares:
    """One kind of token, dealt out. `size` is what every rank holds, `counts` how many of them are no pads."""

    size: int
    counts: tuple[int, ...]

    @classmethod
    def of(cls, total: int, degree: int) -> Shares:
        counts = tuple(total // degree + (rank < total % degree) for rank in range(degree))
        return cls(size=counts[0], counts=counts)

    @property
    def padded(self) -> bool:
        return self.counts[-1] != self.size

    def span(self, rank: int) -> tuple[int, int]:
        """Which tokens of the whole a rank holds: from and up to."""
        begin = sum(self.counts[:rank])
        return begin, begin + self.counts[rank]

    def kept(self) -> list[int] | None:
        """Where the tokens are among all ranks' shares one after another; None is everywhere."""
        if not self.padded:
            return None
        return [rank * self.size + i for rank, count in enumerate(self.counts) for i in range(count)]


@dataclass(frozen=True, slots=True)
class Layout:
    """Text and image tokens of one call on a world of ulysses × ring."""

    text: Shares
    image: Shares
    ulysses: int
    ring: int

    @classmethod
    def of(
        cls, text: int, image: int, ulysses: int, ring: int, attention: Iterable[Kinds] = (JOINT,)
    ) -> Layout:
        """Deals them out.

        Args:
            attention: the kinds of token that each kind of attention in the model has as keys.

        Raises:
            XditError: `bad_tensor` where a ring rank would have none, which attention cannot be merged with.
        """
        degree = ulysses * ring
        layout = cls(Shares.of(text, degree), Shares.of(image, degree), ulysses, ring)
        if not all(layout._tokens(block, kinds) for block in range(ring) for kinds in attention):
            raise XditError(
                Code.BAD_TENSOR,
                f"{text} text and {image} image tokens are too few for a ring of {ring}; use fewer devices.",
            )
        return layout

    def length(self, kinds: Kinds) -> int:
        """How many tokens a ring rank's block of these kinds has, pads among them."""
        return self.ulysses * sum(shares.size for shares in self._of(kinds))

    def valid(self, block: int, kinds: Kinds = JOINT) -> list[int] | None:
        """Where in a ring rank's block the tokens are; None is everywhere, so that nothing need be picked out.

        Args:
            kinds: of the tokens that each rank has in it, in their order.
        """
        positions: list[int] = []
        begin = 0
        for rank in self._ranks(block):
            for shares in self._of(kinds):
                positions += range(begin, begin + shares.counts[rank])
                begin += shares.size
        return None if len(positions) == begin else positions

    def _ranks(self, block: int) -> range:
        return range(block * self.ulysses, (block + 1) * self.ulysses)

    def _of(self, kinds: Kinds) -> list[Shares]:
        return [self.text if kind == "text" else self.image for kind in kinds]

    def _tokens(self, block: int, kinds: Kinds) -> int:
        return sum(shares.counts[rank] for rank in self._ranks(block) for shares in self._of(kinds))
