"""The families of models, one file each, and the tables of those that this version runs, by the work that they do.

A family is a module: what it is called, how it is detected by keys, and what its plan and its inputs must be, so
that the daemon refuses before it asks the ranks. `family.py` says what such a module has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from xditd.catalog.families import autoencoder_kl, bert, clip, echo, flux, hunyuandit, pixart, sd3, sdxl, t5
from xditd.catalog.families.family import Autoencoder, Family, TextEncoder, Transformer
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelInfo

T = TypeVar("T")

TRANSFORMERS: dict[str, Transformer] = {
    module.name: module for module in (flux, sd3, pixart, hunyuandit, sdxl, echo)
}
AUTOENCODERS: dict[str, Autoencoder] = {module.name: module for module in (autoencoder_kl, echo)}
TEXT_ENCODERS: dict[str, TextEncoder] = {module.name: module for module in (clip, t5, bert)}

FAMILIES: dict[str, Family] = {**TRANSFORMERS, **AUTOENCODERS, **TEXT_ENCODERS}
"""All of them, by name: "flux", "sd3", "pixart", "hunyuandit", "sdxl", "autoencoder_kl", "clip", "t5", "bert", "echo"."""


def family(name: str) -> Family:
    """The family of that name.

    Raises:
        XditError: `unknown_family`.
    """
    found = FAMILIES.get(name)
    if found is None:
        raise XditError(Code.UNKNOWN_FAMILY, f"There is no family {name!r}; there are {', '.join(FAMILIES)}.")
    return found


def transformer_of(info: ModelInfo, verb: str) -> Transformer:
    """The family of a model that is asked for a transformer's work.

    Args:
        verb: what it is asked: "denoise".

    Raises:
        XditError: `bad_value` for a model that does other work.
    """
    return _that_does(TRANSFORMERS, "transformer", info, verb)


def autoencoder_of(info: ModelInfo, verb: str) -> Autoencoder:
    """The same of a VAE's work."""
    return _that_does(AUTOENCODERS, "VAE", info, verb)


def text_encoder_of(info: ModelInfo, verb: str) -> TextEncoder:
    """The same of a text encoder's work."""
    return _that_does(TEXT_ENCODERS, "text encoder", info, verb)


def _that_does(families: Mapping[str, T], what: str, info: ModelInfo, verb: str) -> T:
    found = families.get(info.family)
    if found is None:
        raise XditError(
            Code.BAD_VALUE,
            f"{info.kind}/{info.name} is {family(info.family).label}, which does not {verb}; open a run of a {what}.",
        )
    return found
