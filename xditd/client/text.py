"""The tensors of a text that is encoded, on their way out and back. It knows slots and frames, no sockets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from xditd.client.parcel import Parcel
from xditd.client.values import T, like, source
from xditd.protocol.messages import TextEncoded


def put(
    parcel: Parcel, facts: Mapping[str, int], tokens: T, vectors: T | None, mask: T | None, pooled: str
) -> dict[str, Any]:
    """Puts the tensors of an EncodeText into the parcel, with room for its results: those fields of the message.

    Args:
        facts: of the model; without a width the results come as frames.
        pooled: what is asked for, "none" if it is nothing.
    """
    given = source(tokens)
    fields: dict[str, Any] = {
        "tokens": parcel.put(given),
        "vectors": None if vectors is None else parcel.put(source(vectors)),
        "mask": None if mask is None else parcel.put(source(mask)),
    }
    width = facts.get("width")
    if width is not None and len(given.shape) == 2:
        fields["out"] = parcel.floats((*given.shape, width))
        if pooled != "none":
            fields["pooled_out"] = parcel.floats((given.shape[0], width))
    return fields


def opened(
    parcel: Parcel, tokens: T, fields: Mapping[str, Any], answer: TextEncoded, frames: Sequence[Any]
) -> tuple[T, T | None]:
    """The hidden states and the pooled output, as the kind of thing that the tokens were.

    Args:
        fields: of the message, with what `put` returned.
    """
    hidden = like(tokens, parcel.open(answer.hidden, fields.get("out"), frames))
    if answer.pooled is None:
        return hidden, None
    return hidden, like(tokens, parcel.open(answer.pooled, fields.get("pooled_out"), frames))
