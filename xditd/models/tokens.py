"""What a call of a transformer has by token: what it takes to split the call among ranks. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Tokens:
    """Which of a call's tensors have an entry for each token, and what attends to what.

    Attributes:
        image: by keyword, the dimension along which a tensor has an entry for each image token.
        text: the same of text tokens; empty where every image token attends to the whole text by itself.
        attention: for each kind of attention among the split tokens, which of them are its keys, in their order.
    """

    image: Mapping[str, int]
    text: Mapping[str, int] = field(default_factory=dict)
    attention: tuple[tuple[str, ...], ...] = (("text", "image"),)
