"""Flux.1 transformers: dev and schnell, of any width and depth, in the layout of their makers' files."""

from __future__ import annotations

import math
from collections.abc import Mapping

from xditd.catalog.families import inputs, transformer
from xditd.catalog.families.expected import check_shapes, count, has, shape
from xditd.catalog.families.family import Detected, Kinds
from xditd.catalog.header import Header
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelInfo, Plan, Sample
from xditd.protocol.noise import Noise
from xditd.protocol.tensors import FLOATS, Tensor

name = "flux"
label = "a Flux transformer"
part = "transformer"
parallel = True
layers = r"(double|single)_blocks\.\d+\."
dtypes = FLOATS
TENSORS = ("context", "pooled")
VALUES: tuple[str, ...] = ("guidance",)
"""Of a conditioning."""

PATCH = 2  # latent pixels of one token, each way
TIME_WIDTH = 256  # sinusoidal features of a timestep, before their embedding
MAX_BLOCKS = 256  # of a kind; the largest known Flux has 38
SCALE = 8  # image pixels of one latent pixel, each way


def detect(header: Header, prefix: str) -> Detected | None:
    """Facts: width, heads, head_dim, double_blocks, single_blocks, context_width, pooled_width, latent_channels,
    guidance (0 or 1), scale."""
    tensors = header.tensors
    norm = prefix + "double_blocks.0.img_attn.norm.key_norm.scale"
    if norm not in tensors or prefix + "img_in.weight" not in tensors:
        return None
    width, columns = shape(header, prefix + "img_in.weight", 2)
    (head_dim,) = shape(header, norm, 1)
    _, context_width = shape(header, prefix + "txt_in.weight", 2)
    _, pooled_width = shape(header, prefix + "vector_in.in_layer.weight", 2)
    predicted, _ = shape(header, prefix + "final_layer.linear.weight", 2)
    if not head_dim or head_dim % 2 or not width or width % head_dim:
        raise XditError(
            Code.FILE_INVALID,
            f"{header.name}: {norm} has {head_dim} entries; that must be even and divide the width of {width}.",
        )
    if columns != predicted:
        raise XditError(
            Code.NOT_BUILT,
            f"{header.name} is {label} whose img_in.weight takes {columns} columns where it predicts {predicted}: "
            "Fill, Canny, Depth and the like are not built in this version.",
        )
    if columns % PATCH**2:
        raise XditError(
            Code.FILE_INVALID,
            f"{header.name}: {prefix}img_in.weight has {columns} columns, which is no multiple of {PATCH**2}.",
        )
    facts = {
        "width": width,
        "heads": width // head_dim,
        "head_dim": head_dim,
        "double_blocks": count(header, prefix + "double_blocks.", MAX_BLOCKS),
        "single_blocks": count(header, prefix + "single_blocks.", MAX_BLOCKS),
        "context_width": context_width,
        "pooled_width": pooled_width,
        "latent_channels": columns // PATCH**2,
        "guidance": int(has(header, prefix + "guidance_in.")),
        "scale": SCALE,
    }
    keys = check_shapes(header, prefix, parameters(facts), label)
    return Detected(variant="dev" if facts["guidance"] else "schnell", facts=facts, keys=keys)


def parameters(facts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Every parameter of a Flux with these facts, by key: its shape."""
    width, head_dim = facts["width"], facts["head_dim"]
    patch = facts["latent_channels"] * PATCH**2
    table: dict[str, tuple[int, ...]] = {}

    def linear(key: str, outputs: int, inputs: int) -> None:
        table[f"{key}.weight"] = (outputs, inputs)
        table[f"{key}.bias"] = (outputs,)

    def norm(key: str) -> None:
        table[f"{key}.query_norm.scale"] = table[f"{key}.key_norm.scale"] = (head_dim,)

    def embedder(key: str, inputs: int) -> None:
        linear(f"{key}.in_layer", width, inputs)
        linear(f"{key}.out_layer", width, width)

    linear("img_in", width, patch)
    linear("txt_in", width, facts["context_width"])
    embedder("time_in", TIME_WIDTH)
    embedder("vector_in", facts["pooled_width"])
    if facts["guidance"]:
        embedder("guidance_in", TIME_WIDTH)
    for i in range(facts["double_blocks"]):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            linear(f"{block}_mod.lin", 6 * width, width)
            linear(f"{block}_attn.qkv", 3 * width, width)
            norm(f"{block}_attn.norm")
            linear(f"{block}_attn.proj", width, width)
            linear(f"{block}_mlp.0", 4 * width, width)
            linear(f"{block}_mlp.2", width, 4 * width)
    for i in range(facts["single_blocks"]):
        block = f"single_blocks.{i}"
        linear(f"{block}.modulation.lin", 3 * width, width)
        linear(f"{block}.linear1", 7 * width, width)
        norm(f"{block}.norm")
        linear(f"{block}.linear2", width, 5 * width)
    linear("final_layer.linear", patch, width)
    linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return table


def noise(facts: Mapping[str, int]) -> Noise:
    """What kind of noise it takes out of a latent."""
    return Noise(predicts="flow")


# ------------------------------------------------------------------------------------------- plan and inputs


def attention(facts: Mapping[str, int]) -> tuple[Kinds, ...]:
    """Each kind of attention among tokens that ranks deal out: text and image together."""
    return (("text", "image"),)


def check_plan(info: ModelInfo, plan: Plan) -> None:
    blocks = info.facts["double_blocks"] + info.facts["single_blocks"]
    transformer.check_plan(info, plan, label, blocks)


def check_conditioning(info: ModelInfo, tensors: Mapping[str, Tensor], values: Mapping[str, float]) -> None:
    """Tensors context [1 or B, n, context_width] and pooled [1 or B, pooled_width]; value guidance (dev; 3.5 if absent)."""
    inputs.check_names("tensor", tensors, TENSORS, TENSORS)
    inputs.check_names("value", values, VALUES, ())
    context, pooled = tensors["context"], tensors["pooled"]
    inputs.check_dtype("context", context)
    inputs.check_dtype("pooled", pooled)
    inputs.check_shape("context", context, ("B", "n", info.facts["context_width"]))
    inputs.check_shape("pooled", pooled, ("B", info.facts["pooled_width"]))
    transformer.check_batches(tensors)
    guidance = values.get("guidance", 0.0)
    if not (math.isfinite(guidance) and guidance >= 0):
        raise XditError(
            Code.BAD_VALUE, f"guidance is {guidance}; it must be finite and not below 0 (3.5 is usual)."
        )


def check_denoise(
    info: ModelInfo,
    x: Tensor,
    t: tuple[float, ...],
    conditioning: Mapping[str, Tensor],
    out: Tensor | None = None,
) -> None:
    """x [B, latent_channels, H, W] of any height and width; t is sigma, 0 to 1, one or one per latent."""
    transformer.check_latent("x", info, x, conditioning)
    inputs.check_times(t, x.shape[0], 0.0, 1.0)
    inputs.check_same_shape("out", out, x, "x")


def check_sample(
    info: ModelInfo,
    message: Sample,
    conditioning: Mapping[str, Tensor],
    negative: Mapping[str, Tensor] | None = None,
) -> None:
    transformer.check_sample(info, message, conditioning, negative, noise(info.facts))
