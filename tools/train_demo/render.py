"""Scenes as pictures: flat shapes cut from coloured paper, each with a soft shadow. On any device, many at once.

A shape is a signed distance, made once for each shape on a square from -EDGE to EDGE (1 is the radius), in units of the
radius; a thing looks its pixels up there. Straight from the outline, so edges are as sharp at any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F

from tools.train_demo.scenes import COLOURS, NO_GROUND, PAPER, SHAPES, SIDE, Scene

EDGE = 1.5
FINE = 384  # samples of a signed distance, each way
MOST = 4  # things of a scene

COLOUR_NAMES = (NO_GROUND, *COLOURS)
PALETTE = torch.tensor([PAPER, *COLOURS.values()], dtype=torch.float32) / 255
"""[colours, 3], sRGB in 0..1, in the order of COLOUR_NAMES."""

VIGNETTE = 0.07  # how much darker a corner is than the middle
LIGHT = 0.05  # how much lighter the upper left of a thing is than its middle
SHADOW = 0.20  # how much of the ground's light a shadow takes
SHADOW_OFFSET = (3.0, 5.0)  # pixels to the right and down
SHADOW_SOFTNESS = 6.0  # pixels over which it fades


def outline(shape: str) -> torch.Tensor:
    """The corners of a shape that fits the circle of radius 1: [n, 2], across and down."""
    if shape == "circle":
        angles = torch.arange(256) * (math.tau / 256)
        return torch.stack([angles.cos(), angles.sin()], -1)
    if shape == "heart":
        t = torch.arange(128) * (math.tau / 128)
        across = 16 * t.sin() ** 3
        up = 13 * t.cos() - 5 * (2 * t).cos() - 2 * (3 * t).cos() - (4 * t).cos()
        return torch.stack([across, -up - 2.5], -1) / 16.8
    corners = {"square": 4, "diamond": 4, "triangle": 3, "star": 10}[shape]
    turn = math.pi / 4 if shape == "square" else 0.0
    angles = torch.arange(corners) * (math.tau / corners) - math.pi / 2 + turn
    radii = torch.ones(corners)
    if shape == "star":
        radii[1::2] = 0.45
    return torch.stack([angles.cos(), angles.sin()], -1) * radii[:, None]


def signed_distance(points: torch.Tensor, corners: torch.Tensor) -> torch.Tensor:
    """How far each point [n, 2] is from a polygon's outline: negative inside. By its edges, one after the other."""
    nearest = torch.full((len(points),), math.inf)
    inside = torch.zeros(len(points), dtype=torch.bool)
    for a, b in zip(corners, corners.roll(-1, 0), strict=True):
        edge, to = b - a, points - a
        along = ((to @ edge) / (edge @ edge)).clamp(0, 1)
        nearest = torch.minimum(nearest, (to - along[:, None] * edge).norm(dim=-1))
        crosses = (a[1] > points[:, 1]) != (b[1] > points[:, 1])
        where = a[0] + (points[:, 1] - a[1]) / (b[1] - a[1] + 1e-12) * (b[0] - a[0])
        inside ^= crosses & (points[:, 0] < where)
    return torch.where(inside, -nearest, nearest)


@lru_cache(maxsize=4)
def distances(device: torch.device) -> torch.Tensor:
    """[shapes, FINE, FINE] on a device."""
    steps = (torch.arange(FINE) + 0.5) / FINE * 2 * EDGE - EDGE
    points = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).reshape(-1, 2)
    made = [signed_distance(points, outline(shape)).view(FINE, FINE) for shape in SHAPES]
    return torch.stack(made).to(device)


def numbers(scenes: Sequence[Scene]) -> torch.Tensor:
    """Scenes as numbers [B, 1 + MOST·5]: the ground's colour; of each thing its shape, colour, x, y and radius.

    A thing that is not there has radius 0.
    """
    table = torch.zeros(len(scenes), 1 + MOST * 5)
    for row, scene in zip(table, scenes, strict=True):
        row[0] = COLOUR_NAMES.index(scene.description.ground)
        for i, placed in enumerate(scene.placed):
            row[1 + 5 * i : 6 + 5 * i] = torch.tensor(
                [
                    SHAPES.index(placed.thing.shape),
                    COLOUR_NAMES.index(placed.thing.colour),
                    placed.x,
                    placed.y,
                    placed.radius,
                ]
            )
    return table


def render(table: torch.Tensor) -> torch.Tensor:
    """Pictures [B, 3, SIDE, SIDE] in 0..1, on the device where `numbers` [B, 1 + MOST·5] are."""
    device = table.device
    palette = PALETTE.to(device)
    steps = torch.arange(SIDE, device=device) + 0.5
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    from_middle = ((x - SIDE / 2) ** 2 + (y - SIDE / 2) ** 2) / (SIDE**2 / 2)
    picture = palette[table[:, 0].long()][:, :, None, None] * (1 - VIGNETTE * from_middle)
    for i in range(MOST):
        thing = table[:, 1 + 5 * i : 6 + 5 * i]
        field = distances(device)[thing[:, 0].long()][:, None]
        cx, cy, radius = (thing[:, j, None, None] for j in (2, 3, 4))
        there = (radius > 0).float()
        radius = radius.clamp_min(1)

        def from_edge(
            dx: float, dy: float, field=field, cx=cx, cy=cy, radius=radius
        ) -> torch.Tensor:  # pixels, [B, 1, SIDE, SIDE]
            at = torch.stack([(x - cx - dx) / radius, (y - cy - dy) / radius], -1) / EDGE
            inner = F.grid_sample(field, at, padding_mode="border", align_corners=False)
            # Beyond the square: at least as far as its border.
            beyond = (at.abs().amax(-1, keepdim=True).movedim(-1, 1) - 1).clamp_min(0) * EDGE
            return (inner + beyond) * radius[:, None]

        shadow = torch.sigmoid(-from_edge(*SHADOW_OFFSET) * (4 / SHADOW_SOFTNESS)) * there[:, None]
        picture = picture * (1 - SHADOW * shadow)
        covered = (0.5 - from_edge(0, 0)).clamp(0, 1) * there[:, None]
        light = 1 - LIGHT * ((x - cx) + (y - cy)) / (2 * radius)
        colour = palette[thing[:, 1].long()][:, :, None, None] * light[:, None].clamp(0.8, 1.2)
        picture = torch.lerp(picture, colour, covered)
    return picture.clamp(0, 1)
