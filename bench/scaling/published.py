"""Latencies that xDiT has published: seconds of a whole picture, its text and VAE included.

From https://github.com/xdit-project/xDiT, docs/performance: flux.md has a table for the H100; every other figure was read off the
charts that flux.md, sd3.md, pixart_alpha_legacy.md and hunyuandit.md show, and is as good as that. With torch.compile where both are given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xditd.catalog.families import flux, hunyuandit, pixart, sd3
from xditd.protocol.plans import ModelInfo


def _model(family: str, **facts: int) -> ModelInfo:
    return ModelInfo(
        kind="diffusion_models",
        name=family,
        part="transformer",
        family=family,
        variant="",
        dtype="bfloat16",
        bytes=0,
        parameters=0,
        facts={"scale": 8, "latent_channels": 4, **facts},
    )


FLUX = _model(flux.name, width=3072, heads=24, head_dim=128, double_blocks=19, single_blocks=38)
SD3 = _model(sd3.name, width=1536, heads=24, head_dim=64, blocks=24, dual_blocks=0)
PIXART = _model(pixart.name, width=1152, heads=16, blocks=28)
HUNYUAN = _model(hunyuandit.name, width=1408, heads=16, head_dim=88, blocks=40, ff=6144)


@dataclass(frozen=True, slots=True)
class Table:
    """Times of one model, size and kind of device. `seconds` by the degrees of a plan as `degrees` reads them."""

    name: str
    model: ModelInfo
    device: str
    pixels: int
    steps: int
    seconds: Mapping[str, float]
    source: str


TABLES = (
    Table("Flux.1 dev", FLUX, "H100", 1024, 28, {
        "1": 4.30, "ulysses 2": 2.68, "ring 2": 2.60, "ulysses 2 × ring 2": 1.80, "ulysses 4": 1.63, "ring 4": 1.98,
    }, "flux.md, table"),
    Table("Flux.1 schnell", FLUX, "A100", 1024, 4, {
        "1": 1.88, "ulysses 2": 1.25, "ulysses 4": 0.96, "ulysses 8": 0.82,
    }, "flux.md, chart"),
    Table("Flux.1 schnell", FLUX, "A100", 2048, 4, {
        "1": 10.31, "ulysses 2": 5.42, "ulysses 4": 3.40, "ulysses 8": 2.40,
    }, "flux.md, chart"),
    Table("Flux.1 schnell", FLUX, "L40", 1024, 4, {
        "1": 2.89, "ulysses 2": 2.07, "ulysses 2 × ring 2": 1.44,
    }, "flux.md, chart"),
    Table("SD3 medium", SD3, "A100", 1024, 20, {
        "1": 2.54, "cfg 2": 1.51, "cfg 2 × pipefusion 2": 1.17, "cfg 2 × pipefusion 4": 1.15,
    }, "sd3.md, chart"),
    Table("SD3 medium", SD3, "L40", 1024, 20, {
        "1": 3.59, "cfg 2": 1.99, "cfg 2 × pipefusion 2": 1.41, "cfg 2 × pipefusion 4": 1.20,
    }, "sd3.md, chart"),
    Table("PixArt-α", PIXART, "A100", 1024, 20, {
        "1": 1.81, "cfg 2": 0.93, "cfg 2 × pipefusion 2": 0.85, "cfg 2 × pipefusion 4": 0.90,
    }, "pixart_alpha_legacy.md, chart"),
    Table("PixArt-α", PIXART, "L40", 1024, 20, {
        "1": 2.54, "cfg 2": 1.31, "cfg 2 × pipefusion 2": 0.76, "cfg 2 × pipefusion 4": 0.54,
    }, "pixart_alpha_legacy.md, chart"),
    Table("HunyuanDiT", HUNYUAN, "A100", 1024, 50, {
        "1": 14.21, "ulysses 2": 9.05, "cfg 2 × pipefusion 4": 4.04,
    }, "hunyuandit.md, chart"),
    Table("HunyuanDiT", HUNYUAN, "L40", 1024, 50, {
        "1": 14.03, "cfg 2": 7.58,
    }, "hunyuandit.md, chart (which says 20 steps; the time of one GPU suggests 50)"),
)  # fmt: skip


def degrees(plan: str) -> dict[str, int]:
    """ "ulysses 2 × ring 2" as the fields of a Plan; "1" is one device."""
    parts = (part.rsplit(" ", 1) for part in plan.split(" × ") if plan != "1")
    return {name: int(degree) for name, degree in parts}
