"""What the families' conditionings have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from xditd.protocol.errors import Code, XditError


def needed(inputs: Mapping[str, Any], name: str, what: str) -> torch.Tensor:
    """An input without which there is nothing to compute.

    Raises:
        XditError: `bad_tensor`.
    """
    value: torch.Tensor | None = inputs.get(name)
    if value is None:
        raise XditError(
            Code.BAD_TENSOR,
            f"This CONDITIONING has no {what} at all; connect a CLIP Text Encode, whose text may be empty.",
        )
    return value
