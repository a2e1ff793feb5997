"""What text encoders have in common: the shape of what they are asked."""

from __future__ import annotations

from xditd.catalog.families import inputs
from xditd.catalog.sentences import shape_of
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import EncodeText, ModelInfo

INTEGERS = ("int32", "int64")
POOLED = ("none", "plain", "projected")

MAX_TOKENS = 16384  # of a whole batch
MAX_VECTORS = 4096


def check_tokens(info: ModelInfo, message: EncodeText, *, longest: int, pooled: tuple[str, ...]) -> None:
    """Refuses what does not fit the encoder. What the tokens *are* only a rank can read and refuse.

    Args:
        info: facts: width, layers.
        message: the request.
        longest: tokens of one text.
        pooled: what this encoder has, of POOLED.

    Raises:
        XditError: `bad_tensor`, `bad_value`.
    """
    width, layers = info.facts["width"], info.facts["layers"]
    tokens, vectors, mask = message.tokens, message.vectors, message.mask
    inputs.check_dtype("tokens", tokens, INTEGERS)
    inputs.check_shape("tokens", tokens, ("B", "n"))
    batch, length = tokens.shape
    if length > longest or batch * length > MAX_TOKENS:
        raise XditError(
            Code.BAD_TENSOR,
            f"tokens has shape {shape_of(tokens.shape)}; this encoder takes {longest} tokens a text and {MAX_TOKENS} in "
            "all: send the rest in other requests.",
        )
    if vectors is not None:
        inputs.check_dtype("vectors", vectors)
        inputs.check_shape("vectors", vectors, ("k", width))
        if vectors.shape[0] > MAX_VECTORS:
            raise XditError(
                Code.BAD_TENSOR, f"vectors has {vectors.shape[0]} rows; {MAX_VECTORS} are taken at most."
            )
    if mask is not None:
        inputs.check_dtype("mask", mask, (*INTEGERS, "uint8"))
        inputs.check_shape("mask", mask, tokens.shape)
    if message.layer is not None and not -layers <= message.layer < layers:
        raise XditError(
            Code.BAD_VALUE,
            f"layer is {message.layer}; this encoder's lie between {-layers} and {layers - 1}, and none is the last.",
        )
    if message.pooled not in pooled:
        raise XditError(
            Code.BAD_VALUE,
            f"{info.kind}/{info.name} gives no pooled output {message.pooled!r}; it gives {', '.join(pooled)}.",
        )
    if message.out is not None:
        inputs.check_dtype("out", message.out, ("float32",))
        inputs.check_shape("out", message.out, (batch, length, width))
    if message.pooled_out is not None:
        if message.pooled == "none":
            raise XditError(
                Code.BAD_VALUE, "pooled_out names a slot, but pooled is none; name what to put there."
            )
        inputs.check_dtype("pooled_out", message.pooled_out, ("float32",))
        inputs.check_shape("pooled_out", message.pooled_out, (batch, width))
