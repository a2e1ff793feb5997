"""Two layouts of one model: its makers', which most files have, and diffusers', which is the network's. No torch.

A family's module here has `pieces(facts, prefix)`: every parameter of diffusers' module, and where it is in a file of the
makers'. Loading reads it one way, whoever meets diffusers' names in a file the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from xditd.catalog.layouts import autoencoder_kl, flux, pixart, sd3, sdxl
from xditd.catalog.layouts.piece import Piece


class Layout(Protocol):
    """A family's module."""

    def pieces(self, facts: Mapping[str, int], prefix: str = "") -> dict[str, Piece]:
        """Every parameter of the network, by diffusers' name.

        Args:
            facts: as the family's `detect` finds them.
            prefix: of the file's keys.
        """


LAYOUTS: dict[str, Layout] = {
    "flux": flux,
    "sd3": sd3,
    "pixart": pixart,
    "sdxl": sdxl,
    "autoencoder_kl": autoencoder_kl,
}
"""By family. A text encoder has one layout only."""
