"""Two layouts of one model: its makers', which most files have, and diffusers', which is the network's. No torch.

Loading reads the table from the network to the file; whoever meets diffusers' names in a file reads it the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from xditd.catalog import families
from xditd.catalog.header import Header
from xditd.catalog.layouts import autoencoder_kl, flux, hunyuandit, pixart, sd3, sdxl
from xditd.catalog.layouts.piece import Piece


@dataclass(frozen=True, slots=True)
class Layout:
    """A family's.

    Attributes:
        pieces: of (facts, prefix): every parameter of the network, by diffusers' name.
        parameters: of (facts): every parameter of a file of the makers', by key: its shape.
        sketch: of a header in diffusers' layout: as much of the facts as `pieces` needs for its names; None of any other.
        renamed: parts of the network's names, and what files in diffusers' layout may have in their place.
    """

    pieces: Callable[[Mapping[str, int], str], dict[str, Piece]]
    parameters: Callable[[Mapping[str, int]], dict[str, tuple[int, ...]]]
    sketch: Callable[[Header], dict[str, int] | None]
    renamed: Mapping[str, str] = field(default_factory=dict)


LAYOUTS = {
    "flux": Layout(flux.pieces, families.flux.parameters, flux.sketch),
    "sd3": Layout(sd3.pieces, families.sd3.parameters, sd3.sketch),
    "pixart": Layout(pixart.pieces, families.pixart.parameters, pixart.sketch),
    "hunyuandit": Layout(hunyuandit.pieces, families.hunyuandit.parameters, hunyuandit.sketch),
    "sdxl": Layout(sdxl.pieces, families.sdxl.parameters, sdxl.sketch, sdxl.RENAMED),
    "autoencoder_kl": Layout(
        autoencoder_kl.pieces,
        families.autoencoder_kl.parameters,
        autoencoder_kl.sketch,
        autoencoder_kl.RENAMED,
    ),
}
"""By family. A text encoder has one layout only."""
