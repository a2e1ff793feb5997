"""The tensors of a sampling on their way out and back: noise, latent, previews. It knows slots and frames, no sockets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xditd.client.parcel import Parcel
from xditd.client.values import T, like, source
from xditd.protocol.messages import Progress, Sampled

PREVIEWS = 4
"""Slots that a rank writes previews to in turn: one is safe to read until the second after it has been announced."""


def put(parcel: Parcel, noise: T, latent: T | None, shown: bool, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Sample, with room for its result and, where they are shown, for previews.

    Args:
        asked: the fields of the message that are no tensors.
    """
    given = source(noise)
    sizes = [(given.dtype, given.shape, given.nbytes)] * (1 + (PREVIEWS if shown else 0))
    room, *slots = (parcel.room(*size) for size in sizes)
    return {
        **asked,
        "noise": parcel.put(given),
        "latent": None if latent is None else parcel.put(source(latent)),
        "out": room,
        "previews": tuple(slot for slot in slots if slot is not None),
        "preview_frames": shown and room is None,
    }


def preview(parcel: Parcel, noise: T, event: Progress, frames: Sequence[Any]) -> T | None:
    """A copy of the x0 that an event of progress announces, as the kind of thing that the noise was; None where it has none."""
    return None if event.preview is None else like(noise, parcel.copy(event.preview, frames))


def torn(fields: Mapping[str, Any], behind: int) -> bool:
    """Whether a rank may have begun to write over a preview while it was copied: that many events have come since."""
    return fields["out"] is not None and behind > PREVIEWS - 3


def opened(parcel: Parcel, noise: T, fields: Mapping[str, Any], answer: Sampled, frames: Sequence[Any]) -> T:
    """The latent, as the kind of thing that the noise was."""
    return like(noise, parcel.open(answer.latent, fields["out"], frames))
