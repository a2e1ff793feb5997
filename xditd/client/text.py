"""The tensors of a text that is encoded, on their way out and back. It knows slots and frames, no sockets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xditd.client.parcel import Parcel
from xditd.client.values import T, like, source
from xditd.protocol.messages import TextEncoded


def put(
    parcel: Parcel,
    facts: Mapping[str, int],
    tokens: T,
    vectors: T | None,
    mask: T | None,
    asked: Mapping[str, Any],
) -> dict[str, Any]:
    """The tensors of an EncodeText, with room for its results; without a known width they come as frames.

    Args:
        facts: of the model.
        asked: the fields of the message that are no tensors.
    """
    given = source(tokens)
    fields: dict[str, Any] = {
        **asked,
        "tokens": parcel.put(given),
        "vectors": None if vectors is None else parcel.put(source(vectors)),
        "mask": None if mask is None else parcel.put(source(mask)),
    }
    width = facts.get("width")
    if width is not None and len(given.shape) == 2:
        fields["out"] = parcel.floats((*given.shape, width))
        if asked["pooled"] != "none":
            fields["pooled_out"] = parcel.floats((given.shape[0], width))
    return fields


def opened(
    parcel: Parcel, given: T, fields: Mapping[str, Any], answer: TextEncoded, frames: Sequence[Any]
) -> tuple[T, T | None]:
    """The hidden states and the pooled output, as the kind of thing that the tokens were.

    Args:
        given: the tokens.
        fields: of the message, with what was put.
    """
    hidden = like(given, parcel.open(answer.hidden, fields.get("out"), frames))
    if answer.pooled is None:
        return hidden, None
    return hidden, like(given, parcel.open(answer.pooled, fields.get("pooled_out"), frames))
