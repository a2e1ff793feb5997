"""SDXL base UNets, predicting noise or v, in the layout of their makers' files."""

from __future__ import annotations

from collections.abc import Mapping

from xditd.catalog.families import inputs, transformer
from xditd.catalog.families.expected import check_shapes, count, has, shape
from xditd.catalog.families.family import Detected, Kinds
from xditd.catalog.header import Header
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelInfo, Plan, Sample
from xditd.protocol.noise import Noise
from xditd.protocol.tensors import FLOATS, Tensor

name = "sdxl"
label = "an SDXL UNet"
part = "transformer"
parallel = False
layers = r".*\.transformer_blocks\.\d+\."
dtypes = FLOATS
TENSORS = ("context", "vector")
VALUES: tuple[str, ...] = ()
"""Of a conditioning."""

VECTOR_WIDTH = 2816  # pooled text and six sizes; other UNets with labels have another
HEAD_DIM = 64
RES_BLOCKS = 2  # of a level, on the way down
MAX_BLOCKS = 64  # on the way down; SDXL has 9
MAX_DEPTH = 64  # of transformers in a block; SDXL has 10
SCALE = 8  # image pixels of one latent pixel, each way
HIGHEST = 999.0


def detect(header: Header, prefix: str) -> Detected | None:
    """Facts: levels, channels_0 and depth_0 of the first and so on, middle_depth, context_width, vector_width,
    latent_channels, v, zsnr (0 or 1: predicts v, to a signal of zero), scale."""
    first = header.tensors.get(prefix + "label_emb.0.0.weight")
    if first is None or prefix + "input_blocks.0.0.weight" not in header.tensors:
        return None
    if len(first.shape) != 2 or first.shape[1] != VECTOR_WIDTH:
        return None
    width, channels, *_ = shape(header, prefix + "input_blocks.0.0.weight", 4)
    predicted, *_ = shape(header, prefix + "out.2.weight", 4)
    if channels != predicted or "edm_mean" in header.tensors or "edm_vpred.sigma_max" in header.tensors:
        raise XditError(
            Code.NOT_BUILT,
            f"{header.name} is {label} for inpainting, editing or EDM sampling, which is not built in this version.",
        )
    blocks = count(header, prefix + "input_blocks.", MAX_BLOCKS)
    if blocks % (RES_BLOCKS + 1) or not has(header, prefix + "middle_block.1.transformer_blocks."):
        raise XditError(
            Code.NOT_BUILT,
            f"{header.name} is a distilled relative of SDXL (SSD-1B, Vega, KOALA), which is not built in this version.",
        )
    levels = blocks // (RES_BLOCKS + 1)
    facts = {
        "levels": levels,
        "middle_depth": _depth(header, prefix + "middle_block.1."),
        "context_width": 0,
        "vector_width": VECTOR_WIDTH,
        "latent_channels": channels,
        "v": int("v_pred" in header.tensors),
        "zsnr": int("v_pred" in header.tensors and "ztsnr" in header.tensors),
        "scale": SCALE,
    }
    _, facts["context_width"] = shape(
        header, prefix + "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2
    )
    for level in range(levels):
        block = f"{prefix}input_blocks.{1 + level * (RES_BLOCKS + 1)}"
        facts[f"channels_{level}"] = shape(header, f"{block}.0.out_layers.3.weight", 4)[0]
        facts[f"depth_{level}"] = _depth(header, f"{block}.1.")
        if facts[f"channels_{level}"] % HEAD_DIM:
            raise XditError(
                Code.FILE_INVALID,
                f"{header.name}: {block} has {facts[f'channels_{level}']} channels, which is no multiple of {HEAD_DIM}.",
            )
    if width != facts["channels_0"]:
        raise XditError(
            Code.FILE_INVALID,
            f"{header.name}: {prefix}input_blocks.0.0.weight has {width} rows; it must have {facts['channels_0']}.",
        )
    keys = check_shapes(header, prefix, parameters(facts), label)
    return Detected(variant="v" if facts["v"] else "eps", facts=facts, keys=keys)


def _depth(header: Header, start: str) -> int:
    inside = start + "transformer_blocks."
    return count(header, inside, MAX_DEPTH) if has(header, inside) else 0


def parameters(facts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Every parameter of an SDXL UNet with these facts, by key: its shape."""
    levels, context = facts["levels"], facts["context_width"]
    channels = [facts[f"channels_{level}"] for level in range(levels)]
    depths = [facts[f"depth_{level}"] for level in range(levels)]
    first, time = channels[0], 4 * channels[0]
    table: dict[str, tuple[int, ...]] = {}

    def linear(key: str, outputs: int, inputs: int, bias: bool = True) -> None:
        table[f"{key}.weight"] = (outputs, inputs)
        if bias:
            table[f"{key}.bias"] = (outputs,)

    def conv(key: str, outputs: int, inputs: int, size: int = 3) -> None:
        table[f"{key}.weight"] = (outputs, inputs, size, size)
        table[f"{key}.bias"] = (outputs,)

    def norm(key: str, width: int) -> None:
        table[f"{key}.weight"] = table[f"{key}.bias"] = (width,)

    def resnet(key: str, outputs: int, inputs: int) -> None:
        norm(f"{key}.in_layers.0", inputs)
        conv(f"{key}.in_layers.2", outputs, inputs)
        linear(f"{key}.emb_layers.1", outputs, time)
        norm(f"{key}.out_layers.0", outputs)
        conv(f"{key}.out_layers.3", outputs, outputs)
        if outputs != inputs:
            conv(f"{key}.skip_connection", outputs, inputs, size=1)

    def transformers(key: str, width: int, depth: int) -> None:
        norm(f"{key}.norm", width)
        linear(f"{key}.proj_in", width, width)
        linear(f"{key}.proj_out", width, width)
        for i in range(depth):
            block = f"{key}.transformer_blocks.{i}"
            for attention, seen in (("attn1", width), ("attn2", context)):
                linear(f"{block}.{attention}.to_q", width, width, bias=False)
                linear(f"{block}.{attention}.to_k", width, seen, bias=False)
                linear(f"{block}.{attention}.to_v", width, seen, bias=False)
                linear(f"{block}.{attention}.to_out.0", width, width)
            linear(f"{block}.ff.net.0.proj", 8 * width, width)
            linear(f"{block}.ff.net.2", width, 4 * width)
            for i_norm in (1, 2, 3):
                norm(f"{block}.norm{i_norm}", width)

    linear("time_embed.0", time, first)
    linear("time_embed.2", time, time)
    linear("label_emb.0.0", time, facts["vector_width"])
    linear("label_emb.0.2", time, time)
    conv("input_blocks.0.0", first, facts["latent_channels"])
    width, block, skips = first, 1, [first]
    for level in range(levels):
        for _ in range(RES_BLOCKS):
            resnet(f"input_blocks.{block}.0", channels[level], width)
            width = channels[level]
            if depths[level]:
                transformers(f"input_blocks.{block}.1", width, depths[level])
            skips.append(width)
            block += 1
        if level < levels - 1:
            conv(f"input_blocks.{block}.0.op", width, width)
            skips.append(width)
            block += 1
    resnet("middle_block.0", width, width)
    transformers("middle_block.1", width, facts["middle_depth"])
    resnet("middle_block.2", width, width)
    block = 0
    for level in reversed(range(levels)):
        for i in range(RES_BLOCKS + 1):
            resnet(f"output_blocks.{block}.0", channels[level], width + skips.pop())
            width = channels[level]
            if depths[level]:
                transformers(f"output_blocks.{block}.1", width, depths[level])
            if level and i == RES_BLOCKS:
                conv(f"output_blocks.{block}.{2 if depths[level] else 1}.conv", width, width)
            block += 1
    norm("out.0", width)
    conv("out.2", facts["latent_channels"], width)
    return table


def noise(facts: Mapping[str, int]) -> Noise:
    """What kind of noise it takes out of a latent."""
    return Noise(
        predicts="v" if facts["v"] else "eps", start=0.00085, end=0.012, zero_snr=bool(facts["zsnr"])
    )


# ------------------------------------------------------------------------------------------- plan and inputs


def attention(facts: Mapping[str, int]) -> tuple[Kinds, ...]:
    """None: its tokens are not dealt out."""
    return ()


def check_plan(info: ModelInfo, plan: Plan) -> None:
    inputs.check_degrees_built(label, plan, ())


def check_conditioning(info: ModelInfo, tensors: Mapping[str, Tensor], values: Mapping[str, float]) -> None:
    """Tensors context [1 or B, n, context_width] and vector [1 or B, vector_width]; no values."""
    inputs.check_names("tensor", tensors, TENSORS, TENSORS)
    inputs.check_names("value", values, VALUES, ())
    shapes = {"context": ("B", "n", info.facts["context_width"]), "vector": ("B", info.facts["vector_width"])}
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
    """x [B, latent_channels, H, W] of any height and width; t is an index, 0 to 999, one or one per latent."""
    transformer.check_latent("x", info, x, conditioning)
    inputs.check_times(t, x.shape[0], 0.0, HIGHEST)
    inputs.check_same_shape("out", out, x, "x")


def check_sample(
    info: ModelInfo,
    message: Sample,
    conditioning: Mapping[str, Tensor],
    negative: Mapping[str, Tensor] | None = None,
) -> None:
    transformer.check_sample(info, message, conditioning, negative, noise(info.facts))
