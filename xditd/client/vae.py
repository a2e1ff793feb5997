"""The tensors of a picture that is decoded or encoded, on their way out and back. It knows slots and frames, no sockets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xditd.client.parcel import Parcel
from xditd.client.values import T, like, source
from xditd.protocol.messages import Decoded, Encoded


def put_latent(
    parcel: Parcel, facts: Mapping[str, int], latent: T, clamp: bool, tile: int | None = None
) -> dict[str, Any]:
    """The tensors of a Decode, with room for the image; that comes as a frame where its size cannot be told."""
    given, scale = source(latent), facts.get("scale", 8)
    shape = given.shape
    image = (shape[0], shape[2] * scale, shape[3] * scale, 3) if len(shape) == 4 else None
    return {"latent": parcel.put(given), "clamp": clamp, "tile": tile, "out": image and parcel.floats(image)}


def put_image(parcel: Parcel, facts: Mapping[str, int], image: T, tile: int | None = None) -> dict[str, Any]:
    """The tensors of an Encode, with room for the latent; that comes as a frame where its size cannot be told."""
    given, scale, channels = source(image), facts.get("scale", 8), facts.get("latent_channels")
    shape, latent = given.shape, None
    if len(shape) == 4 and channels is not None and min(shape[1], shape[2]) >= scale:
        latent = (shape[0], channels, shape[1] // scale, shape[2] // scale)
    return {"image": parcel.put(given), "tile": tile, "out": latent and parcel.floats(latent)}


def opened(
    parcel: Parcel, given: T, fields: Mapping[str, Any], answer: Decoded | Encoded, frames: Sequence[Any]
) -> T:
    """The image or latent, as the kind of thing that was given.

    Args:
        fields: of the message, with what was put.
    """
    result = answer.image if isinstance(answer, Decoded) else answer.latent
    value: T = like(given, parcel.open(result, fields["out"], frames))
    return value
