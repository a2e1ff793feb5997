"""Scenes of coloured shapes, and the English that describes them. Pure: no tensors, no files.

A scene is what a caption says, made definite: every thing has a place and a radius. A caption says less than its scene
(of `two red circles` it leaves open where they are), so many scenes fit one caption; `judge.py` tells whether a
picture does.

    caption := things [place] ["on a" colour ("background" | "ground")] ["."]
    things  := thing | thing relation thing | thing "and" thing | thing "," thing "and" thing | count size colour shapes
    thing   := ("a" | "an") [size] colour shape
"""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass, replace

SIDE = 256
"""Pixels of a picture, each way. Places and radii are in pixels, from the top left corner."""

SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (221, 44, 48),
    "orange": (243, 140, 32),
    "yellow": (250, 215, 55),
    "green": (56, 168, 78),
    "blue": (45, 100, 222),
    "purple": (132, 66, 182),
    "pink": (246, 142, 184),
    "white": (252, 252, 252),
    "black": (34, 34, 40),
}
"""sRGB."""

PAPER = (240, 228, 205)
"""The ground of a caption that names none."""

NO_GROUND = "paper"

RADII = {"small": (20.0, 26.0), "": (34.0, 44.0), "large": (56.0, 70.0)}
"""Radius of the circle around a thing, in pixels: from and to, by the size that a caption says or leaves out."""

SIZE_WORDS = {"small": ("small", "little", "tiny"), "": ("",), "large": ("large", "big")}

RELATIONS: dict[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}

PLACES: dict[str, tuple[float, float]] = {
    "in the middle": (0.5, 0.5),
    "at the top": (0.5, 0.0),
    "at the bottom": (0.5, 1.0),
    "on the left": (0.0, 0.5),
    "on the right": (1.0, 0.5),
    "in the top left corner": (0.0, 0.0),
    "in the top right corner": (1.0, 0.0),
    "in the bottom left corner": (0.0, 1.0),
    "in the bottom right corner": (1.0, 1.0),
}
"""Where a lone thing is: across and down, of the room that it has."""

COUNTS = {2: "two", 3: "three", 4: "four"}

MARGIN = 8.0  # pixels between a thing and the edge
GAP = 10.0  # pixels between two things, at least

HELD_OUT = 0.05
"""The part of all descriptions that training never sees."""


@dataclass(frozen=True, slots=True)
class Thing:
    """One shape: what is said of it."""

    shape: str
    colour: str
    size: str = ""  # of SIZE_WORDS


@dataclass(frozen=True, slots=True)
class Description:
    """What a caption says, whatever its words.

    Attributes:
        things: in the order in which they are named; several of a kind are named once.
        count: of the one thing that is named; 1 where several are.
        relation: of the first thing to the second, of RELATIONS; "" says none.
        place: of the one thing, of PLACES; "" says none.
        ground: a colour; NO_GROUND says none.
    """

    things: tuple[Thing, ...]
    count: int = 1
    relation: str = ""
    place: str = ""
    ground: str = NO_GROUND


@dataclass(frozen=True, slots=True)
class Placed:
    """A thing where it is."""

    thing: Thing
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True)
class Scene:
    """A description made definite."""

    description: Description
    placed: tuple[Placed, ...]


# ------------------------------------------------------------------------------------------------------ in words


def caption(description: Description, chance: random.Random | None = None) -> str:
    """A description in words; `chance` picks among words that mean the same, without it the first are taken."""

    def one_of(words: tuple[str, ...]) -> str:
        return words[0] if chance is None else chance.choice(words)

    def noun(thing: Thing, plural: bool = False) -> str:
        words = (one_of(SIZE_WORDS[thing.size]), thing.colour, thing.shape + "s" * plural)
        return " ".join(word for word in words if word)

    def with_article(words: str) -> str:
        return ("an " if words[0] in "aeiou" else "a ") + words

    named = [with_article(noun(thing)) for thing in description.things]
    if description.count > 1:
        text = f"{COUNTS[description.count]} {noun(description.things[0], plural=True)}"
    elif description.relation:
        text = f"{named[0]} {one_of(RELATIONS[description.relation])} {named[1]}"
    elif len(named) > 1:
        text = ", ".join(named[:-1]) + f" and {named[-1]}"
    else:
        text = named[0]
    if description.place:
        text += f" {description.place}"
    if description.ground != NO_GROUND:
        text += f" on {with_article(description.ground)} {one_of(('background', 'ground'))}"
    if chance is not None and chance.random() < 0.1:
        text = text[0].upper() + text[1:] + chance.choice(("", "."))
    return text


def held_out(description: Description) -> bool:
    """Whether training leaves this description out, under every wording. No chance in it: any process agrees."""
    digest = hashlib.sha256(caption(description).encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32


# ----------------------------------------------------------------------------------------------------- by chance


def describe(chance: random.Random) -> Description:
    """Any description, of every kind."""
    kind = chance.choices((_alone, _related, _counted, _listed), (32, 36, 14, 18))[0]
    return kind(chance)


def described(chance: random.Random, *, held: bool) -> Description:
    """A description that is held out of training, or one that is not."""
    while True:
        description = describe(chance)
        if held_out(description) == held:
            return description


def _ground(chance: random.Random) -> str:
    return NO_GROUND if chance.random() < 0.4 else chance.choice(tuple(COLOURS))


def _thing(chance: random.Random, ground: str, sizes: tuple[str, ...]) -> Thing:
    # White on paper is hard to see, and to judge.
    unfit = {ground, "white"} if ground == NO_GROUND else {ground}
    colour = chance.choice([colour for colour in COLOURS if colour not in unfit])
    return Thing(chance.choice(SHAPES), colour, chance.choice(sizes))


def _alone(chance: random.Random) -> Description:
    ground = _ground(chance)
    place = chance.choice(("", *PLACES)) if chance.random() < 0.75 else ""
    return Description((_thing(chance, ground, ("small", "", "", "large")),), place=place, ground=ground)


def _related(chance: random.Random) -> Description:
    ground = _ground(chance)
    things = tuple(_thing(chance, ground, ("small", "", "", "", "large")) for _ in range(2))
    if things[0].size == things[1].size == "large":  # they would not fit side by side with room to spare
        things = (things[0], replace(things[1], size=""))
    if things[0] == things[1]:
        return _related(chance)
    return Description(things, relation=chance.choice(tuple(RELATIONS)), ground=ground)


def _counted(chance: random.Random) -> Description:
    ground = _ground(chance)
    return Description(
        (_thing(chance, ground, ("small", "", "")),), count=chance.choice(tuple(COUNTS)), ground=ground
    )


def _listed(chance: random.Random) -> Description:
    ground = _ground(chance)
    number = chance.choice((2, 2, 3))
    things: list[Thing] = []
    while len(things) < number:
        thing = _thing(chance, ground, ("small", "", ""))
        if (thing.shape, thing.colour) not in {(other.shape, other.colour) for other in things}:
            things.append(thing)
    return Description(tuple(things), ground=ground)


def settle(description: Description, chance: random.Random) -> Scene:
    """A scene that fits the description: places by chance, nothing over anything else or over the edge."""
    things = description.things * description.count
    while True:
        placed: list[Placed] = []
        for thing in things:
            radius = chance.uniform(*RADII[thing.size])
            low, high = radius + MARGIN, SIDE - radius - MARGIN
            x, y = chance.uniform(low, high), chance.uniform(low, high)
            if description.place:
                across, down = PLACES[description.place]
                x, y = (
                    low + (high - low) * min(1, max(0, share + chance.uniform(-0.06, 0.06)))
                    for share in (across, down)
                )
            placed.append(Placed(thing, x, y, radius))
        scene = Scene(description, tuple(placed))
        if _apart(placed) and (not description.relation or _as_related(scene)):
            return scene


def _apart(placed: list[Placed]) -> bool:
    return all(
        math.hypot(a.x - b.x, a.y - b.y) >= a.radius + b.radius + GAP
        for i, a in enumerate(placed)
        for b in placed[:i]
    )


def _as_related(scene: Scene) -> bool:
    first, second = scene.placed
    return holds(scene.description.relation, second.x - first.x, second.y - first.y, slack=0.7)


def holds(relation: str, right: float, down: float, slack: float = 1.0) -> bool:
    """Whether the first of two things is so related to the second, which lies that far to its right and below it.

    Args:
        slack: how much of the distance may lie the other way: at 1 as much as this way.
    """
    along = {"left": right, "right": -right, "above": down, "below": -down}[relation]
    across = down if relation in ("left", "right") else right
    return along > 0 and abs(across) <= slack * along
