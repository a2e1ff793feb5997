"""Two layouts of one model: its makers', which most files have, and diffusers', which is the network's. No torch.

Loading reads the table from the network to the file; whoever meets diffusers' names in a file reads it the other way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from xditd.catalog import families
from xditd.catalog.layouts import autoencoder_kl, flux, hunyuandit, pixart, sd3, sdxl
from xditd.catalog.layouts.piece import Piece


@dataclass(frozen=True, slots=True)
class Layout:
    """A family's.

    Attributes:
        pieces: of (facts, prefix): every parameter of the network, by diffusers' name.
        parameters: of (facts): every parameter of a file of the makers', by key: its shape.
    """

    pieces: Callable[[Mapping[str, int], str], dict[str, Piece]]
    parameters: Callable[[Mapping[str, int]], dict[str, tuple[int, ...]]]


LAYOUTS = {
    "flux": Layout(flux.pieces, families.flux.parameters),
    "sd3": Layout(sd3.pieces, families.sd3.parameters),
    "pixart": Layout(pixart.pieces, families.pixart.parameters),
    "hunyuandit": Layout(hunyuandit.pieces, families.hunyuandit.parameters),
    "sdxl": Layout(sdxl.pieces, families.sdxl.parameters),
    "autoencoder_kl": Layout(autoencoder_kl.pieces, families.autoencoder_kl.parameters),
}
"""By family. A text encoder has one layout only."""
