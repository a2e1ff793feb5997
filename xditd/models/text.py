"""What text encoders have in common: from tokens to vectors, and from a mask to what attention adds."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from xditd.models.weights import Weights
from xditd.protocol.errors import Code, XditError


class TextEncoder(Protocol):
    """What a text encoder family's `load` returns."""

    backbone: torch.nn.Module
    weights: Weights

    def encode(
        self,
        tokens: torch.Tensor,
        *,
        vectors: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        layer: int | None = None,
        final_norm: bool = True,
        pooled: str = "none",
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states and the pooled output; see `clip.network.Clip.encode`."""


def embed(table: nn.Embedding, tokens: torch.Tensor, vectors: torch.Tensor | None) -> torch.Tensor:
    """The vectors [B, n, width] of tokens [B, n]: of token t the table's row t, of token -1 - i row i of `vectors`.

    Raises:
        XditError: `bad_value` for a token that is neither. On a GPU it would end the process.
    """
    least, most = (int(value) for value in torch.aminmax(tokens))
    given = 0 if vectors is None else vectors.shape[0]
    if most >= table.num_embeddings or least < -given:
        odd = most if most >= table.num_embeddings else least
        raise XditError(
            Code.BAD_VALUE,
            f"A token is {odd}; this encoder's lie between 0 and {table.num_embeddings - 1}"
            + (f", and those of the {given} vectors between -{given} and -1." if given else "."),
        )
    x = table(tokens.clamp(min=0).long())
    if least < 0 and vectors is not None:
        own = vectors.to(x.dtype)[(-1 - tokens).clamp(min=0).long()]
        x = torch.where((tokens < 0).unsqueeze(-1), own, x)
    return x


def additive(mask: torch.Tensor | None, x: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """What is added to the scores of attention: 0 where a token attends to another, the least number elsewhere.

    Args:
        mask: [B, n]; what is 0 is not attended to. None is all.
        x: the embedded tokens [B, n, width].
        causal: a token attends to itself and those before it.
    """
    length = x.shape[1]
    attend = torch.ones(1, 1, length, length, dtype=torch.bool, device=x.device)
    if causal:
        attend = attend.tril()
    if mask is not None:
        attend = attend & mask.bool()[:, None, None, :]
    # Not minus infinity: a token that may attend to none would become NaN, and all others with it.
    return torch.zeros(attend.shape, dtype=x.dtype, device=x.device).masked_fill_(
        ~attend, torch.finfo(x.dtype).min
    )
