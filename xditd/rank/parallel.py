"""One transformer's call split among a world: whole tensors in and out on every rank, a share of the work on each.

It stands where the plain module stands and takes the same keywords. Exact: whatever the degree does not divide is
padded, and the pads are kept out of every attention (`shards` says how). Knows no xfuser but the seam's World, and of
a family only which of its tensors have tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from xditd.models.tokens import Tokens
from xditd.rank.shards import Layout, Shares
from xditd.rank.xfuser_seam import World

Positions = torch.Tensor | None


class SequenceParallel:
    """Runs a wrapped transformer on this rank's share of its tokens.

    Args:
        run: the family's `run` of the transformer that `World.wrap` returned.
        tokens: what a call has by token.
        world: that this rank is in.
        device: of this rank.
    """

    def __init__(
        self, run: Callable[..., torch.Tensor], tokens: Tokens, world: World, device: torch.device
    ) -> None:
        self._run = run
        self._tokens = tokens
        self._world = world
        self._device = device
        self._layout = lru_cache(maxsize=32)(self._lay_out)

    def __call__(self, **keywords: Any) -> torch.Tensor:
        """As the plain module, with all tokens. Every rank must call it with the same values.

        Returns:
            All image tokens, on every rank.
        """
        image, text = (_count(keywords, named) for named in (self._tokens.image, self._tokens.text))
        layout, blocks, kept = self._layout(text, image)
        self._world.keep(blocks)
        self._world.set_tokens(layout.image.size)
        for shares, named in ((layout.image, self._tokens.image), (layout.text, self._tokens.text)):
            for name, dim in named.items():
                keywords[name] = self._share(keywords[name], shares, dim)
        whole = self._world.gather(self._run(**keywords))
        return whole if kept is None else whole.index_select(1, kept)

    def _share(self, tokens: torch.Tensor, shares: Shares, dim: int) -> torch.Tensor:
        begin, end = shares.span(self._world.rank)
        share = tokens.narrow(dim, begin, end - begin)
        missing = shares.size - (end - begin)
        return share if not missing else F.pad(share, (0, 0) * (share.ndim - dim - 1) + (0, missing))

    def _lay_out(
        self, text: int, image: int
    ) -> tuple[Layout, tuple[Mapping[int, torch.Tensor], ...], Positions]:
        """The layout, what attention is to see of each ring rank's block by the block's length, and what is kept of
        the output."""
        world, attention = self._world, self._tokens.attention
        layout = Layout.of(text, image, world.ulysses, world.ring, attention)
        blocks = tuple(
            {
                layout.length(kinds): self._positions(positions)
                for kinds in attention
                if (positions := layout.valid(block, kinds)) is not None
            }
            for block in range(world.ring)
        )
        kept = layout.image.kept()
        return layout, blocks, None if kept is None else self._positions(kept)

    def _positions(self, positions: list[int]) -> torch.Tensor:
        return torch.tensor(positions, device=self._device)


def _count(keywords: Mapping[str, torch.Tensor], named: Mapping[str, int]) -> int:
    """How many tokens there are of a kind."""
    return next((keywords[name].shape[dim] for name, dim in named.items()), 0)
