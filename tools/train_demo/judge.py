"""Whether a picture is what a caption says: found in its pixels, by colour, shape, size and place.

It knows how the pictures are made (`render.py`), and no network: each pixel is of the colour that it is nearest to,
darker or lighter; pixels of one colour that touch are a thing; a thing has the shape whose outline covers it best.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy import ndimage

from tools.train_demo.render import COLOUR_NAMES, PALETTE, outline, signed_distance
from tools.train_demo.scenes import MARGIN, NO_GROUND, PLACES, SHAPES, SIDE, Description, holds

DARKEST, LIGHTEST = 0.76, 1.08
"""How much of its light a colour may have lost to shadow and vignette, or gained."""

LEAST_PIXELS = 150  # a smaller thing is a speck; the smallest that is drawn has 400
LEAST_LIKENESS = 0.72  # intersection over union of a thing and its outline
BETWEEN_SIZES = (30.0, 50.0)  # pixels of radius
PLACE_SLACK = 0.25  # of the room that a thing has
FRAME = 6  # pixels along the edge that show the ground
LEAST_GROUND = 0.6  # of the frame
TIPS = 6  # pixels that an opening takes of a tip, at most
TEMPLATE = 64  # samples of a template, each way


@dataclass(frozen=True, slots=True)
class Found:
    """A thing in a picture."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    likeness: float  # to its shape, 0 to 1

    @property
    def size(self) -> str:
        """As captions say it."""
        small, large = BETWEEN_SIZES
        return "small" if self.radius < small else "large" if self.radius > large else ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found, and what of it is not as the caption says: () where all is."""

    found: tuple[Found, ...]
    faults: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.faults


def judge(picture: np.ndarray, description: Description) -> Verdict:
    """Holds a picture [SIDE, SIDE, 3] in 0..1 against a description."""
    names = _colours(description)
    nearest = _nearest_colours(picture, names)
    found = tuple(
        thing
        for i, name in enumerate(names)
        if name != description.ground
        for thing in _things(nearest == i, name)
    )
    faults = _faults(found, description)
    frame = np.ones((SIDE, SIDE), bool)
    frame[FRAME:-FRAME, FRAME:-FRAME] = False
    if (nearest[frame] == names.index(description.ground)).mean() < LEAST_GROUND:
        faults = ("the ground has another colour", *faults)
    return Verdict(found, faults)


def _colours(description: Description) -> list[str]:
    """All that a picture may have: paper and white are never together."""
    return [
        name for name in COLOUR_NAMES if name != ("white" if description.ground == NO_GROUND else NO_GROUND)
    ]


def _nearest_colours(picture: np.ndarray, names: list[str]) -> np.ndarray:
    """Of each pixel, the index of the colour that comes nearest to it in any light that it may have."""
    colours = PALETTE.numpy()[[COLOUR_NAMES.index(name) for name in names]]
    onto, own = picture @ colours.T, (colours**2).sum(-1)  # |p - l c|² = |p|² - 2 l p·c + l² |c|²
    light = np.clip(onto / own, DARKEST, LIGHTEST)
    nearest: np.ndarray = (light * (light * own - 2 * onto)).argmin(-1)
    return nearest


def _things(mask: np.ndarray, colour: str) -> list[Found]:
    """Things of one colour. Edges between two others have colours in between: thin lines, which are opened away."""
    if mask.sum() < LEAST_PIXELS:
        return []
    labels, _ = ndimage.label(ndimage.binary_opening(mask, iterations=2))
    things = []
    for i, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        # The opening took tips as well: what is of its colour within a few pixels is the thing's.
        near = tuple(slice(max(0, side.start - TIPS), side.stop + TIPS) for side in (rows, columns))
        whole = np.zeros_like(mask)
        whole[near] = ndimage.binary_dilation(labels[near] == i, iterations=TIPS) & mask[near]
        if whole.sum() >= LEAST_PIXELS:
            things.append(_recognised(whole, colour))
    return things


def _recognised(mask: np.ndarray, colour: str) -> Found:
    """The shape whose template, stretched to the same box, a thing is most like."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    at_y = (top + (np.arange(TEMPLATE) + 0.5) / TEMPLATE * (bottom - top)).astype(int)
    at_x = (left + (np.arange(TEMPLATE) + 0.5) / TEMPLATE * (right - left)).astype(int)
    seen = mask[np.ix_(at_y, at_x)]
    likeness = {}
    for shape in SHAPES:
        template, box = _template(shape)
        as_drawn = (
            (bottom - top) / (right - left) * box[0] / box[1]
        )  # 1 where the box has the shape's proportions
        same = (seen & template).sum() / (seen | template).sum()
        likeness[shape] = float(same) * min(as_drawn, 1 / as_drawn)
    shape = max(likeness, key=likeness.__getitem__)
    (width, height), (low_x, low_y) = _template(shape)[1], outline(shape).amin(0).tolist()
    radius = ((right - left) / width + (bottom - top) / height) / 2
    # The middle of the circle around it, not of its box.
    return Found(colour, shape, left - low_x * radius, top - low_y * radius, float(radius), likeness[shape])


@lru_cache(maxsize=len(SHAPES))
def _template(shape: str) -> tuple[np.ndarray, tuple[float, float]]:
    """A shape's inside on its own box [TEMPLATE, TEMPLATE], and the box's width and height in radii."""
    corners = outline(shape)
    low, high = corners.amin(0), corners.amax(0)
    steps = (torch.arange(TEMPLATE) + 0.5) / TEMPLATE
    points = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).reshape(-1, 2)
    inside = signed_distance(points * (high - low) + low, corners).view(TEMPLATE, TEMPLATE) < 0
    width, height = (high - low).tolist()
    return inside.numpy(), (width, height)


def _faults(found: tuple[Found, ...], description: Description) -> tuple[str, ...]:
    wanted = sorted((thing.colour, thing.shape) for thing in description.things * description.count)
    have = sorted((thing.colour, thing.shape) for thing in found)
    if have != wanted:
        return (f"it has {_listed(have)}, not {_listed(wanted)}",)
    faults = []
    placed = []  # in the order of the description
    left = list(found)
    for thing in description.things * description.count:
        # Of two alike, the one that has the size.
        alike = [one for one in left if (one.colour, one.shape) == (thing.colour, thing.shape)]
        one = next((one for one in alike if one.size == thing.size), alike[0])
        left.remove(one)
        placed.append(one)
        if one.size != thing.size:
            faults.append(
                f"the {thing.colour} {thing.shape} has radius {one.radius:.0f}, which is {one.size or 'medium'}"
            )
        if one.likeness < LEAST_LIKENESS:
            faults.append(f"the {thing.colour} {thing.shape} is like one by {one.likeness:.2f} only")
    if description.relation:
        first, second = placed
        if not holds(description.relation, second.x - first.x, second.y - first.y):
            faults.append(f"the first thing is not {description.relation} of the second")
    if description.place:
        (one,) = placed
        low, high = one.radius + MARGIN, SIDE - one.radius - MARGIN
        shares = ((one.x - low) / (high - low), (one.y - low) / (high - low))
        if any(
            abs(share - wish) > PLACE_SLACK
            for share, wish in zip(shares, PLACES[description.place], strict=True)
        ):
            faults.append(f"the thing is not {description.place}")
    return tuple(faults)


def _listed(things: list[tuple[str, str]]) -> str:
    return ", ".join(f"{colour} {shape}" for colour, shape in things) or "nothing"
