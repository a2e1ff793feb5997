"""What a LoRA's file holds, by its header alone: pairs of matrices, each for one module of a model. Pure.

A pair's product, up · down, is added to the module's weight, times strength · alpha / rank; without an alpha, times
strength. (Hu et al., LoRA, 2021; alpha as kohya's sd-scripts write it, and ComfyUI reads it.) The files of trainers differ
in what they call the module and the two matrices; here the latter are told apart, `lora_fit` sees to the former.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from xditd.catalog.families.expected import LOADABLE
from xditd.catalog.header import Header, TensorEntry
from xditd.catalog.sentences import listed, shape_of, shown
from xditd.protocol.errors import Code, XditError

FORMS = (
    (".lora_up.weight", ".lora_down.weight"),  # kohya
    (".lora_B.weight", ".lora_A.weight"),  # peft
    (".lora_B.default.weight", ".lora_A.default.weight"),  # peft, with its adapter's name
    (".lora.up.weight", ".lora.down.weight"),  # diffusers before peft
    ("_lora.up.weight", "_lora.down.weight"),  # its attention processors
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),  # its text encoders
    (".lora_B", ".lora_A"),
)
"""What ends the key of up, and that of down."""

ALPHA = ".alpha"

UNBUILT = {
    ".dora_scale": "a DoRA",
    ".lora_magnitude_vector": "a DoRA",
    ".lora_magnitude_vector.weight": "a DoRA",
    ".lora_magnitude_vector.default.weight": "a DoRA",
    ".hada_w1_a": "a LoHa",
    ".lokr_w1": "a LoKr",
    ".lokr_w1_a": "a LoKr",
    ".oft_blocks": "an OFT",
    ".oft_diag": "an OFT",
    ".boft_blocks": "a BOFT",
    ".a1.weight": "a GLoRA",
    ".lora_mid.weight": "a LoCon with a core tensor",
    ".glora_a1.weight": "a GLoRA",
    ".reshape_weight": "a control LoRA, which widens the model",
    ".lora_B.bias": "a LoRA with biases",
    ".diff": "a set of whole differences",
    ".diff_b": "a set of whole differences",
    ".set_weight": "a set of whole weights",
}
"""By the ending of one of its keys: what changes weights in a way that this version does not compute."""

TEXT = ("lora_te", "text_encoder", "te1.", "te2.", "te3.", "lora_prior_te", "clip_l.", "clip_g.", "t5xxl.")
"""What begins the name of a text encoder's module."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One module's.

    Attributes:
        module: as the file calls it.
        up, down: keys of the matrices [outputs, rank, …] and [rank, inputs, …].
        alpha: key of a scalar; "" where there is none.
        shape: of their product, [outputs, inputs, …].
        rank: of it.
    """

    module: str
    up: str
    down: str
    alpha: str
    shape: tuple[int, ...]
    rank: int

    @property
    def of_text(self) -> bool:
        """Whether it changes a text encoder."""
        return self.module.startswith(TEXT)


def pairs(header: Header) -> list[Pair]:
    """The pairs of a LoRA's file, in its order.

    Raises:
        XditError: `unknown_family` where it has none; `not_built` where it is more than pairs, or of a dtype that is not
            loaded; `file_invalid` where half of a pair is missing or the two do not fit each other.
    """
    for key in header.tensors:
        for ending, what in UNBUILT.items():
            if key.endswith(ending):
                raise XditError(
                    Code.NOT_BUILT,
                    f"{header.name} is {what} ({shown(key)}), which this version does not merge; use a plain LoRA "
                    "(lora_up and lora_down, or lora_A and lora_B), or a model that it was merged into.",
                )
    found = [pair for key in header.tensors if (pair := _pair(header, key)) is not None]
    if not found:
        raise XditError(
            Code.UNKNOWN_FAMILY,
            f"{header.name} is no LoRA, by its keys ({listed(header.tensors) or 'it has none'}).",
        )
    return found


def others(header: Header, of: Iterable[Pair]) -> list[str]:
    """Keys that belong to no pair."""
    known = {key for pair in of for key in (pair.up, pair.down, pair.alpha)}
    return [key for key in header.tensors if key not in known]


def _pair(header: Header, key: str) -> Pair | None:
    """The pair whose up is at a key."""
    for up, down in FORMS:
        if key.endswith(down) and key[: -len(down)] + up not in header.tensors:
            raise _half(header, key, key[: -len(down)] + up)
        if key.endswith(up):
            module = key[: -len(up)]
            break
    else:
        return None
    other = module + down
    if other not in header.tensors:
        raise _half(header, key, other)
    ups, downs = _matrix(header, key), _matrix(header, other)
    rank = downs.shape[0]
    if ups.shape[1] != rank or any(size != 1 for size in ups.shape[2:]):
        raise XditError(
            Code.FILE_INVALID,
            f"{header.name}: {shown(key)} has shape {shape_of(ups.shape)} and {shown(other)} {shape_of(downs.shape)}, "
            "which are no pair; fetch it again.",
        )
    alpha = module + ALPHA
    if alpha in header.tensors and (
        header.tensors[alpha].elements != 1 or header.tensors[alpha].dtype not in LOADABLE
    ):
        raise XditError(Code.FILE_INVALID, f"{header.name}: {shown(alpha)} is not one number.")
    return Pair(
        module=module,
        up=key,
        down=other,
        alpha=alpha if alpha in header.tensors else "",
        shape=(ups.shape[0], *downs.shape[1:]),
        rank=rank,
    )


def _matrix(header: Header, key: str) -> TensorEntry:
    entry = header.tensors[key]
    if entry.dtype not in LOADABLE:
        raise XditError(
            Code.NOT_BUILT, f"{header.name} has {shown(key)} in {entry.dtype}, which is not loaded."
        )
    if entry.scale is not None:
        raise XditError(
            Code.NOT_BUILT,
            f"{header.name} is a LoRA in scaled fp8, which this version does not merge; use its bf16 or fp16 file.",
        )
    if len(entry.shape) < 2 or 0 in entry.shape:
        raise XditError(
            Code.FILE_INVALID,
            f"{header.name}: {shown(key)} has shape {shape_of(entry.shape)}, which is no matrix.",
        )
    return entry


def _half(header: Header, key: str, other: str) -> XditError:
    return XditError(
        Code.FILE_INVALID, f"{header.name} has {shown(key)}, but lacks {shown(other)}; fetch it again."
    )
