"""What is measured: a model's shape and a step's inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from xditd.models.making import flux_facts


@dataclass(frozen=True, slots=True)
class Size:
    """A Flux transformer and one step of it."""

    says: str
    facts: dict[str, int]
    dtype: torch.dtype
    latent: tuple[int, ...]  # [1, C, H, W]
    text: int  # tokens

    def inputs(self, seed: int) -> dict[str, torch.Tensor]:
        """A step's `x`, `context` and `pooled`, random, on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        shapes = {
            "x": self.latent,
            "context": (1, self.text, self.facts["context_width"]),
            "pooled": (1, self.facts["pooled_width"]),
        }
        return {
            name: torch.randn(shape, generator=generator).to(self.dtype) for name, shape in shapes.items()
        }


FLUX_DEV = Size(
    "FLUX.1-dev's size (24 heads, 19 + 38 blocks), bf16, 1024², 512 text tokens",
    flux_facts(heads=24, double_blocks=19, single_blocks=38),
    torch.bfloat16,
    (1, 16, 128, 128),
    512,
)
SMALL = Size(
    "a tiny Flux (2 heads, 2 + 2 blocks), fp32, 256², 64 text tokens",
    flux_facts(heads=2, double_blocks=2, single_blocks=2),
    torch.float32,
    (1, 16, 32, 32),
    64,
)
