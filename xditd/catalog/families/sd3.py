"""Stable Diffusion 3 and 3.5 (medium, large) transformers, in the layout of their makers' files."""

from __future__ import annotations

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

name = "sd3"
label = "an SD3 transformer"
part = "transformer"
parallel = True
layers = r"joint_blocks\.\d+\."
dtypes = FLOATS
TENSORS = ("context", "pooled")
VALUES: tuple[str, ...] = ()
"""Of a conditioning."""

PATCH = 2  # latent pixels of one token, each way
HEAD_DIM = 64  # of every SD3; no key of SD3.0 tells it
TIME_WIDTH = 256  # sinusoidal features of a timestep, before their embedding
MAX_BLOCKS = 256  # the largest known SD3 has 38
SCALE = 8  # image pixels of one latent pixel, each way
HIGHEST = 1000.0  # t is 1000 times sigma


def detect(header: Header, prefix: str) -> Detected | None:
    """Facts: width, heads, head_dim, blocks, dual_blocks, qk_norm (0 or 1), positions, context_width, pooled_width,
    latent_channels, scale. `dual_blocks` is how many of the first blocks attend to the image once more."""
    if prefix + "joint_blocks.0.context_block.attn.qkv.weight" not in header.tensors:
        return None
    if has(header, prefix + "context_processor."):
        raise XditError(
            Code.NOT_BUILT,
            f"{header.name} is {label} with a context_processor, which is not built in this version.",
        )
    width, channels, *_ = shape(header, prefix + "x_embedder.proj.weight", 4)
    _, context_width = shape(header, prefix + "context_embedder.weight", 2)
    _, pooled_width = shape(header, prefix + "y_embedder.mlp.0.weight", 2)
    _, places, _ = shape(header, prefix + "pos_embed", 3)
    blocks = count(header, prefix + "joint_blocks.", MAX_BLOCKS)
    if width % HEAD_DIM:
        raise XditError(
            Code.FILE_INVALID,
            f"{header.name}: {prefix}x_embedder.proj.weight has {width} rows; SD3's widths are multiples of {HEAD_DIM}.",
        )
    positions = side(header, prefix + "pos_embed", places)
    dual = [has(header, f"{prefix}joint_blocks.{i}.x_block.attn2.") for i in range(blocks)]
    facts = {
        "width": width,
        "heads": width // HEAD_DIM,
        "head_dim": HEAD_DIM,
        "blocks": blocks,
        "dual_blocks": sum(dual),
        "qk_norm": int(has(header, prefix + "joint_blocks.0.x_block.attn.ln_q.")),
        "positions": positions,
        "context_width": context_width,
        "pooled_width": pooled_width,
        "latent_channels": channels,
        "scale": SCALE,
    }
    keys = check_shapes(header, prefix, parameters(facts), label)
    return Detected(variant=_variant(facts), facts=facts, keys=keys)


def _variant(facts: Mapping[str, int]) -> str:
    if facts["dual_blocks"]:
        return "3.5_medium"
    return "3.5_large" if facts["qk_norm"] else "3"


def parameters(facts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Every parameter of an SD3 with these facts, by key: its shape."""
    width, blocks = facts["width"], facts["blocks"]
    channels = facts["latent_channels"]
    table: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, facts["positions"] ** 2, width),
        "x_embedder.proj.weight": (width, channels, PATCH, PATCH),
        "x_embedder.proj.bias": (width,),
    }

    def linear(key: str, outputs: int, inputs: int) -> None:
        table[f"{key}.weight"] = (outputs, inputs)
        table[f"{key}.bias"] = (outputs,)

    def embedder(key: str, inputs: int) -> None:
        linear(f"{key}.mlp.0", width, inputs)
        linear(f"{key}.mlp.2", width, width)

    def attention(key: str, *, last: bool = False) -> None:
        linear(f"{key}.qkv", 3 * width, width)
        if facts["qk_norm"]:
            table[f"{key}.ln_q.weight"] = table[f"{key}.ln_k.weight"] = (facts["head_dim"],)
        if not last:
            linear(f"{key}.proj", width, width)

    embedder("t_embedder", TIME_WIDTH)
    embedder("y_embedder", facts["pooled_width"])
    linear("context_embedder", width, facts["context_width"])
    for i in range(blocks):
        dual, last = i < facts["dual_blocks"], i == blocks - 1
        # The text ends in the last block: it is attended to there, and what it would become is of no use.
        for stream, modulations in (("x_block", 9 if dual else 6), ("context_block", 2 if last else 6)):
            block = f"joint_blocks.{i}.{stream}"
            ends = last and stream == "context_block"
            linear(f"{block}.adaLN_modulation.1", modulations * width, width)
            attention(f"{block}.attn", last=ends)
            if dual and stream == "x_block":
                attention(f"{block}.attn2")
            if not ends:
                linear(f"{block}.mlp.fc1", 4 * width, width)
                linear(f"{block}.mlp.fc2", width, 4 * width)
    linear("final_layer.linear", channels * PATCH**2, width)
    linear("final_layer.adaLN_modulation.1", 2 * width, width)
    return table


def noise(facts: Mapping[str, int]) -> Noise:
    """What kind of noise it takes out of a latent."""
    return Noise(predicts="flow", multiplier=HIGHEST)


# ------------------------------------------------------------------------------------------- plan and inputs


def attention(facts: Mapping[str, int]) -> tuple[Kinds, ...]:
    """Each kind of attention among tokens that ranks deal out: both together, and in dual blocks the image's alone."""
    return (("image", "text"), *((("image",),) if facts["dual_blocks"] else ()))


def check_plan(info: ModelInfo, plan: Plan) -> None:
    transformer.check_plan(info, plan, label, info.facts["blocks"])


def check_conditioning(info: ModelInfo, tensors: Mapping[str, Tensor], values: Mapping[str, float]) -> None:
    """Tensors context [1 or B, n, context_width] and pooled [1 or B, pooled_width]; no values."""
    inputs.check_names("tensor", tensors, TENSORS, TENSORS)
    inputs.check_names("value", values, VALUES, ())
    shapes = {"context": ("B", "n", info.facts["context_width"]), "pooled": ("B", info.facts["pooled_width"])}
    for key, expected in shapes.items():
        inputs.check_dtype(key, tensors[key])
        inputs.check_shape(key, tensors[key], expected)
    transformer.check_batches(tensors)


def check_denoise(
    info: ModelInfo,
    x: Tensor,
    t: tuple[float, ...],
    conditioning: Mapping[str, Tensor],
    out: Tensor | None = None,
) -> None:
    """x [B, latent_channels, H, W], up to 2 × positions each way; t is 1000 × sigma, one or one per latent."""
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
    most = PATCH * info.facts["positions"]
    if max(x.shape[2:]) > most:
        raise XditError(
            Code.BAD_TENSOR,
            f"{what} has shape {shape_of(x.shape)}; {info.name} knows the places of {most} × {most} latent pixels at most.",
        )
