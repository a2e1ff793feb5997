"""A batch computed one item after another, where there is no memory for all at once: the same result, in time for room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch


def singly(compute: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
    """What `compute` makes of a batch [B, …], made of one item [1, …] after another."""
    return torch.cat([compute(item) for item in batch.split(1)])


def item_of(conditioning: Any, index: int, batch: int) -> Any:
    """The conditioning of one item: of a family's dataclass whose tensors are [1 or batch, …]."""
    mine = {
        field.name: value[index : index + 1]
        for field in fields(conditioning)
        if isinstance(value := getattr(conditioning, field.name), torch.Tensor) and value.shape[0] == batch
    }
    return replace(conditioning, **mine)


def predicted_singly(
    predict: Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor],
    x: torch.Tensor,
    t: torch.Tensor,
    conditioning: Any,
) -> torch.Tensor:
    """What a transformer's `predict` makes of a batch: x [B, …], t [B] and a conditioning of batch 1 or B."""
    count = x.shape[0]
    return torch.cat(
        [
            predict(
                x[i : i + 1], t[i : i + 1], item_of(conditioning, i, count) if count > 1 else conditioning
            )
            for i in range(count)
        ]
    )
