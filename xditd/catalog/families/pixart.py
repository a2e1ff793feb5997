"""PixArt-α and PixArt-Σ transformers, in the layout of their makers' files."""

from __future__ import annotations

import math
from collections.abc import Mapping

from xditd.catalog.families import inputs, transformer
from xditd.catalog.families.expected import check_shapes, count, has, shape, side
from xditd.catalog.families.family import Detected, Kinds
from xditd.catalog.header import Header
from xditd.catalog.sentences import shape_of
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelInfo, Plan, Sample
from xditd.protocol.noise import Noise
from xditd.protocol.tensors import FLOATS, Tensor

name = "pixart"
label = "a PixArt transformer"
part = "transformer"
parallel = True
layers = r"blocks\.\d+\."
dtypes = FLOATS
TENSORS = ("context",)
VALUES = ("height", "width", "aspect_ratio")
"""Of a conditioning."""

PATCH = 2  # latent pixels of one token, each way
HEADS = 16  # of every PixArt; no key tells it
TIME_WIDTH = 256  # sinusoidal features of a timestep or a size, before their embedding
MAX_BLOCKS = 256  # every known PixArt has 28
SCALE = 8  # image pixels of one latent pixel, each way
HIGHEST = 999.0
UNIT = 64  # latent pixels of a picture of 512, in which positions are measured


def detect(header: Header, prefix: str) -> Detected | None:
    """Facts: width, heads, blocks, context_width, text_tokens and positions (0 where the file has no such tensor), sizes
    (0 or 1: conditioned on them, as α is), latent_channels, predicted_channels, scale."""
    if prefix + "t_block.1.weight" not in header.tensors:
        return None
    width, channels, *_ = shape(header, prefix + "x_embedder.proj.weight", 4)
    _, context_width = shape(header, prefix + "y_embedder.y_proj.fc1.weight", 2)
    outputs, _ = shape(header, prefix + "final_layer.linear.weight", 2)
    sizes = has(header, prefix + "ar_embedder.")
    if width % HEADS or width % 4 or (sizes and width % 3):
        raise XditError(
            Code.FILE_INVALID,
            f"{header.name}: {prefix}x_embedder.proj.weight has {width} rows; PixArt's widths are multiples of {HEADS}"
            f"{' and of 3' if sizes else ''}.",
        )
    positions = 0
    if has(header, prefix + "pos_embed"):
        positions = side(header, prefix + "pos_embed", shape(header, prefix + "pos_embed", 3)[1])
        if positions * PATCH < UNIT:
            raise XditError(
                Code.NOT_BUILT,
                f"{header.name} is {label} of pictures below 512 pixels, which is not built in this version.",
            )
    text_tokens = 0
    if has(header, prefix + "y_embedder.y_embedding"):
        text_tokens, _ = shape(header, prefix + "y_embedder.y_embedding", 2)
    facts = {
        "width": width,
        "heads": HEADS,
        "blocks": count(header, prefix + "blocks.", MAX_BLOCKS),
        "context_width": context_width,
        "text_tokens": text_tokens,
        "positions": positions,
        "sizes": int(sizes),
        "latent_channels": channels,
        "predicted_channels": outputs // PATCH**2,
        "scale": SCALE,
    }
    if facts["predicted_channels"] not in (channels, 2 * channels):
        raise XditError(
            Code.FILE_INVALID,
            f"{header.name}: {prefix}final_layer.linear.weight has {outputs} rows, which {channels} channels do not give.",
        )
    keys = check_shapes(header, prefix, parameters(facts), label)
    return Detected(variant="alpha" if sizes else "sigma", facts=facts, keys=keys)


def parameters(facts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Every parameter of a PixArt with these facts, by key: its shape."""
    width, channels = facts["width"], facts["latent_channels"]
    table: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (width, channels, PATCH, PATCH),
        "x_embedder.proj.bias": (width,),
    }
    # Of training alone: the picture's own positions, and the text that stands for none.
    if facts["positions"]:
        table["pos_embed"] = (1, facts["positions"] ** 2, width)
    if facts["text_tokens"]:
        table["y_embedder.y_embedding"] = (facts["text_tokens"], facts["context_width"])

    def linear(key: str, outputs: int, inputs: int) -> None:
        table[f"{key}.weight"] = (outputs, inputs)
        table[f"{key}.bias"] = (outputs,)

    def embedder(key: str, outputs: int) -> None:
        linear(f"{key}.mlp.0", outputs, TIME_WIDTH)
        linear(f"{key}.mlp.2", outputs, outputs)

    embedder("t_embedder", width)
    if facts["sizes"]:
        embedder("csize_embedder", width // 3)
        embedder("ar_embedder", width // 3)
    linear("t_block.1", 6 * width, width)
    linear("y_embedder.y_proj.fc1", width, facts["context_width"])
    linear("y_embedder.y_proj.fc2", width, width)
    for i in range(facts["blocks"]):
        block = f"blocks.{i}"
        table[f"{block}.scale_shift_table"] = (6, width)
        linear(f"{block}.attn.qkv", 3 * width, width)
        linear(f"{block}.attn.proj", width, width)
        linear(f"{block}.cross_attn.q_linear", width, width)
        linear(f"{block}.cross_attn.kv_linear", 2 * width, width)
        linear(f"{block}.cross_attn.proj", width, width)
        linear(f"{block}.mlp.fc1", 4 * width, width)
        linear(f"{block}.mlp.fc2", width, 4 * width)
    linear("final_layer.linear", facts["predicted_channels"] * PATCH**2, width)
    table["final_layer.scale_shift_table"] = (2, width)
    return table


def noise(facts: Mapping[str, int]) -> Noise:
    """What kind of noise it takes out of a latent."""
    return Noise(predicts="eps", start=0.0001, end=0.02, by_root=False)


# ------------------------------------------------------------------------------------------- plan and inputs


def attention(facts: Mapping[str, int]) -> tuple[Kinds, ...]:
    """Each kind of attention among tokens that ranks deal out: of the image alone; each attends to the whole text."""
    return (("image",),)


def check_plan(info: ModelInfo, plan: Plan) -> None:
    transformer.check_plan(info, plan, label, info.facts["blocks"])


def check_conditioning(info: ModelInfo, tensors: Mapping[str, Tensor], values: Mapping[str, float]) -> None:
    """Tensor context [1 or B, n, context_width]; values height and width of the picture, and their ratio, which α alone
    heeds and takes from the latent where they are absent."""
    inputs.check_names("tensor", tensors, TENSORS, TENSORS)
    inputs.check_names("value", values, VALUES, ())
    inputs.check_dtype("context", tensors["context"])
    inputs.check_shape("context", tensors["context"], ("B", "n", info.facts["context_width"]))
    for key, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise XditError(Code.BAD_VALUE, f"{key} is {value}; it must be finite and above 0.")


def check_denoise(
    info: ModelInfo,
    x: Tensor,
    t: tuple[float, ...],
    conditioning: Mapping[str, Tensor],
    out: Tensor | None = None,
) -> None:
    """x [B, latent_channels, H, W] of even H and W, more than 32 in the mean; t is an index, 0 to 999."""
    transformer.check_latent("x", info, x, conditioning)
    _check_size("x", info, x)
    inputs.check_times(t, x.shape[0], 0.0, HIGHEST)
    inputs.check_same_shape("out", out, x, "x")


def check_sample(
    info: ModelInfo,
    message: Sample,
    conditioning: Mapping[str, Tensor],
    negative: Mapping[str, Tensor] | None = None,
) -> None:
    transformer.check_sample(info, message, conditioning, negative, noise(info.facts))
    _check_size("noise", info, message.noise)


def _check_size(what: str, info: ModelInfo, x: Tensor) -> None:
    height, width = x.shape[2:]
    if height % PATCH or width % PATCH or round((height + width) // 2 / UNIT) == 0:
        raise XditError(
            Code.BAD_TENSOR,
            f"{what} has shape {shape_of(x.shape)}; for {info.name} its height and width must be even, and more than "
            f"{UNIT // 2} in the mean.",
        )
