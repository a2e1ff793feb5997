"""A transformer as stages that follow one another, each with some of its blocks, on some of an image's tokens at a time.

What image tokens attend to that are not computed now is what the network remembers of them from the step before
(`Recall`). Torch; no ranks, no sampler.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn


class Span(NamedTuple):
    """Some of an image's tokens, in their order: from and up to."""

    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Stream:
    """What goes from one stage to the next: hidden states of text tokens, where a family has such, and of image tokens.

    Attributes:
        text: how many of the tokens are text, which come first.
        tokens: [B, text + n, width]; where blocks have skip connections [B, text + n + skips·n, width], with what blocks
            further on take of blocks before behind the image.
    """

    text: int
    tokens: torch.Tensor


class Stages(Protocol):
    """A family's transformer in stages. `given` is of the call: what it takes beside the image, the same for all spans."""

    width: int  # of hidden states
    recall: Recall
    skips: int  # that come into this stage with an image

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """A latent [B, C, H, W] as its tokens [B, n, …]."""

    def unpack(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Tokens as a latent."""

    def text(self, conditioning: Any) -> int:
        """How many text tokens the stream of a call has."""

    def give(self, shape: tuple[int, ...], t: torch.Tensor, conditioning: Any) -> Any:
        """What a call takes beside the image: `shape` is the latent's, t and conditioning as for `predict`."""

    def enter(self, tokens: torch.Tensor, given: Any, span: Span) -> Stream:
        """In the first stage: what blocks take of these tokens."""

    def through(self, stream: Stream, given: Any, span: Span) -> Stream:
        """Through the blocks of this stage."""

    def leave(self, stream: Stream, given: Any) -> torch.Tensor:
        """In the last stage: the prediction for these tokens, [B, n, …]."""


class Recall:
    """Keys and values of a whole image's tokens, of which some were computed now and the rest remembered."""

    def __init__(self) -> None:
        self._kept: dict[Hashable, torch.Tensor] | None = None
        self._span = Span(0, 0)
        self._whole = True
        self.count = 0  # tokens of the span

    def set(self, kept: dict[Hashable, torch.Tensor] | None, span: Span, count: int) -> None:
        """For what follows.

        Args:
            kept: of this call; None where nothing need be remembered.
            span: of the tokens that are computed.
            count: of all image tokens.
        """
        self._kept = kept
        self._span = span
        self._whole = span == (0, count)
        self.count = span.end - span.begin

    def __call__(self, name: Hashable, fresh: torch.Tensor) -> torch.Tensor:
        """Those of the span as [B, n, …] become those of the whole image."""
        if self._kept is None:
            return fresh
        if self._whole:
            self._kept[name] = fresh.contiguous()
            return fresh
        whole = self._kept[name]
        whole[:, self._span.begin : self._span.end] = fresh
        return whole

    def follow(self, attentions: dict[str, nn.Module]) -> None:
        """Has these attentions over image tokens use it: right after K and V are made, before norms."""
        for name, attention in attentions.items():
            for kind in ("to_k", "to_v"):
                attention.get_submodule(kind).register_forward_hook(_remembering(self, (name, kind)))


def _remembering(recall: Recall, name: Hashable) -> Any:
    def remember(module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        return recall(name, output)

    return remember


def held_blocks(blocks: Any) -> list[Any]:
    """The blocks of a list that this stage holds; the others' places have none."""
    return [block for block in blocks if not isinstance(block, nn.Identity)]
