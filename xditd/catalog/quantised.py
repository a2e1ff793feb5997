"""Weights that a file holds in fewer bits than they are computed in: scaled fp8 is understood, the rest known by name. Pure.

Scaled fp8, as ComfyUI writes it: beside `NAME.weight` in fp8 one number that it is to be multiplied with, `NAME.scale_weight`,
in newer files `NAME.weight_scale`. What else such files hold (a scale of inputs, marks of the format) is for arithmetic in
fp8, which is not done here.
"""

from __future__ import annotations

from dataclasses import replace

from xditd.catalog.header import Header, TensorEntry
from xditd.catalog.sentences import shown
from xditd.protocol.errors import Code, XditError

FP8 = ("F8_E4M3", "F8_E5M2")
SCALES = (".scale_weight", ".weight_scale")
"""What ends the key of a scale, in the place of ".weight"."""

MARKS = (".scale_input", ".input_scale", ".comfy_quant")
"""What ends keys that say nothing of a weight's value."""

MARK = "scaled_fp8"
"""The last part of a key that an older file has once for each of its models."""

NUMBERS = ("F32", "F16", "BF16")

FOREIGN = (
    ("nunchaku's SVDQuant", ".wscales"),
    ("nunchaku's SVDQuant", ".smooth_factor"),
    ("bitsandbytes' NF4", ".quant_state.bitsandbytes__nf4"),
    ("bitsandbytes' FP4", ".quant_state.bitsandbytes__fp4"),
    ("bitsandbytes' 4 bits", ".absmax"),
    ("bitsandbytes' 8 bits", ".SCB"),
    ("ComfyUI's nvfp4", ".weight_scale_2"),
    ("ComfyUI's w4a8", ".weight_s_rel"),
    ("GPTQ or AWQ", ".qzeros"),
    ("quanto", ".weight._data"),
    ("quanto", ".weight._scale"),
)  # fmt: skip
"""What a sentence calls a quantisation, and what ends a key that only its files have."""


def plain(header: Header) -> Header:
    """A header in which weights of scaled fp8 know their scale, and nothing but parameters is left.

    Raises:
        XditError: `not_built` for any other quantisation, by its name; `file_invalid` for a scale of nothing.
    """
    _refuse_foreign(header)
    scales = {key: weight for key in header.tensors if (weight := _weight_of(key)) in header.tensors}
    marks = {key for key in header.tensors if key.endswith(MARKS) or key.rpartition(".")[2] == MARK}
    if not scales and not marks:
        return header
    tensors = dict(header.tensors)
    for key, weight in scales.items():
        _check(header, key, tensors[key], weight, tensors[weight])
        tensors[weight] = replace(tensors[weight], scale=header.tensors[key])
    kept = {key: entry for key, entry in tensors.items() if key not in scales and key not in marks}
    return replace(header, tensors=kept)


def _weight_of(key: str) -> str:
    """The key of the weight that a scale is for; "" of a key that is none."""
    for ending in SCALES:
        if key.endswith(ending):
            return key[: -len(ending)] + ".weight"
    return ""


def _check(header: Header, key: str, scale: TensorEntry, weight: str, entry: TensorEntry) -> None:
    if entry.dtype in FP8 and scale.dtype in NUMBERS and scale.elements == 1:
        return
    if entry.dtype == "F8_E4M3" and scale.dtype in ("U8", "F8_E8M0"):
        what = "ComfyUI's mxfp8"
    elif entry.dtype in FP8:
        what = "fp8 with several scales for one weight"
    elif entry.dtype in ("I8", "U8"):
        what = "ComfyUI's int8 or int4"
    else:
        raise XditError(
            Code.FILE_INVALID,
            f"{header.name} has a scale, {shown(key)}, for {shown(weight)} in {entry.dtype}, which needs none.",
        )
    raise _refusal(header, what, key)


def _refuse_foreign(header: Header) -> None:
    for key in header.tensors:
        for what, ending in FOREIGN:
            if key.endswith(ending):
                raise _refusal(header, what, key)


def _refusal(header: Header, what: str, key: str) -> XditError:
    return XditError(
        Code.NOT_BUILT,
        f"{header.name} is quantised as {what} ({shown(key)}), which this version does not load; use the model's bf16, "
        "fp16, fp8, scaled fp8 or GGUF file.",
    )
