"""The families of models, one file each, and the table of those that this version runs.

A family is a module: what it is called, how it is detected by keys, and what its plan and its inputs must be, so
that the daemon refuses before it asks the ranks. `family.py` says what such a module has.
"""

from __future__ import annotations

from xditd.catalog.families import autoencoder_kl, clip, echo, flux, hunyuandit, pixart, sd3, sdxl, t5
from xditd.catalog.families.family import Family
from xditd.protocol.errors import Code, XditError

FAMILIES: dict[str, Family] = {
    module.name: module for module in (flux, sd3, pixart, hunyuandit, sdxl, autoencoder_kl, clip, t5, echo)
}
"""By name: "flux", "sd3", "pixart", "hunyuandit", "sdxl", "autoencoder_kl", "clip", "t5", "echo"."""


def family(name: str) -> Family:
    """The family of that name.

    Raises:
        XditError: `unknown_family`.
    """
    found = FAMILIES.get(name)
    if found is None:
        raise XditError(Code.UNKNOWN_FAMILY, f"There is no family {name!r}; there are {', '.join(FAMILIES)}.")
    return found
