"""One transformer's call split among a world: whole tensors in and out on every rank, a share of the work on each.

It stands where the plain module stands and takes the same keywords. Exact: whatever the degree does not divide is
padded, and the pads are kept out of every attention (`shards` says how). Knows no xfuser but the seam's World.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from xditd.rank.shards import Layout, Shares
from xditd.rank.xfuser_seam import World

Positions = torch.Tensor | None


class SequenceParallel:
    """Runs a wrapped Flux-like transformer on this rank's share of its tokens.

    Args:
        wrapped: as `World.wrap` returned it.
        world: that this rank is in.
        device: of this rank.
    """

    def __init__(self, wrapped: Callable[..., Any], world: World, device: torch.device) -> None:
        self._wrapped = wrapped
        self._world = world
        self._device = device
        self._layout = lru_cache(maxsize=32)(self._lay_out)

    def __call__(
        self,
        *,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        img_ids: torch.Tensor,
        txt_ids: torch.Tensor,
        **same: Any,
    ) -> torch.Tensor:
        """As the plain module. Every rank must call it with the same values.

        Args:
            hidden_states: all image tokens, [B, n, C].
            encoder_hidden_states: all text tokens, [B, m, D].
            img_ids, txt_ids: of all of them, [n, 3] and [m, 3].
            same: what every rank gets whole.

        Returns:
            All image tokens, on every rank.
        """
        text, image = encoder_hidden_states.shape[1], hidden_states.shape[1]
        layout, blocks, kept = self._layout(text, image)
        self._world.keep(blocks)
        tokens = self._wrapped(
            hidden_states=self._share(hidden_states, layout.image, 1),
            encoder_hidden_states=self._share(encoder_hidden_states, layout.text, 1),
            img_ids=self._share(img_ids, layout.image, 0),
            txt_ids=self._share(txt_ids, layout.text, 0),
            return_dict=False,
            **same,
        )[0][0]
        whole = self._world.gather(tokens)
        return whole if kept is None else whole.index_select(1, kept)

    def _share(self, tokens: torch.Tensor, shares: Shares, dim: int) -> torch.Tensor:
        begin, end = shares.span(self._world.rank)
        share = tokens.narrow(dim, begin, end - begin)
        missing = shares.size - (end - begin)
        return share if not missing else F.pad(share, (0, 0, 0, missing))

    def _lay_out(self, text: int, image: int) -> tuple[Layout, tuple[Positions, ...], Positions]:
        """The layout, what attention is to see of each ring rank's block, and what is kept of the output."""
        world = self._world
        layout = Layout.of(text, image, world.ulysses, world.ring)
        blocks = tuple(self._positions(layout.valid(block)) for block in range(world.ring))
        return layout, blocks, self._positions(layout.image.kept())

    def _positions(self, positions: list[int] | None) -> Positions:
        return None if positions is None else torch.tensor(positions, device=self._device)
