"""AutoencoderKL: the VAE of Flux, SD3, SDXL and their kin, in the layout of their makers' files (encoder.down.0…)."""

from __future__ import annotations

from collections.abc import Mapping

from xditd.catalog.families import inputs
from xditd.catalog.families.expected import check_shapes, count, has, shape
from xditd.catalog.families.family import Detected
from xditd.catalog.header import Header
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelInfo, Plan
from xditd.protocol.tensors import FLOATS, Tensor

name = "autoencoder_kl"
label = "an AutoencoderKL VAE"
part = "vae"
parallel = False
layers = ""
dtypes = FLOATS

IMAGE_CHANNELS = 3
NORM_GROUPS = 32  # of every normalisation; shapes do not tell it
MAX_LEVELS = 8  # the known ones have 4
MAX_BLOCKS = 16  # of a level; the known ones have 2
TILE_STEP = 4  # latent pixels: a tile's side is a multiple of so many, since a quarter of it overlaps


def detect(header: Header, prefix: str) -> Detected | None:
    """Facts: latent_channels, scale, channels (of the first level), levels, channels_0… (of each level), blocks
    (of a level of the encoder), quant (1 with the convolutions around the latent)."""
    tensors = header.tensors
    entry = tensors.get(prefix + "decoder.conv_in.weight")
    if entry is None or len(entry.shape) != 4 or prefix + "decoder.mid.block_1.norm1.weight" not in tensors:
        return None
    levels = count(header, prefix + "encoder.down.", MAX_LEVELS)
    blocks = count(header, prefix + "encoder.down.0.block.", MAX_BLOCKS)
    facts = {
        "latent_channels": entry.shape[1],
        "scale": 2 ** (levels - 1),
        "channels": shape(header, prefix + "encoder.conv_in.weight", 4)[0],
        "levels": levels,
        "blocks": blocks,
        "quant": int(has(header, prefix + "quant_conv.") or has(header, prefix + "post_quant_conv.")),
    }
    for i in range(levels):
        key = f"{prefix}encoder.down.{i}.block.0.conv1.weight"
        facts[f"channels_{i}"] = shape(header, key, 4)[0]
        if facts[f"channels_{i}"] % NORM_GROUPS:
            raise XditError(
                Code.FILE_INVALID,
                f"{header.name}: {key} has {facts[f'channels_{i}']} channels, which is no multiple of {NORM_GROUPS}.",
            )
    keys = check_shapes(header, prefix, parameters(facts), label)
    return Detected(variant="", facts=facts, keys=keys)


def parameters(facts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Every parameter of an AutoencoderKL with these facts, by key: its shape."""
    table: dict[str, tuple[int, ...]] = {}
    levels, blocks, latent = facts["levels"], facts["blocks"], facts["latent_channels"]
    widths = [facts[f"channels_{i}"] for i in range(levels)]
    first, last = facts["channels"], widths[-1]

    def conv(key: str, outputs: int, inputs: int, kernel: int = 3) -> None:
        table[f"{key}.weight"] = (outputs, inputs, kernel, kernel)
        table[f"{key}.bias"] = (outputs,)

    def norm(key: str, width: int) -> None:
        table[f"{key}.weight"] = table[f"{key}.bias"] = (width,)

    def block(key: str, inputs: int, outputs: int) -> None:
        norm(f"{key}.norm1", inputs)
        conv(f"{key}.conv1", outputs, inputs)
        norm(f"{key}.norm2", outputs)
        conv(f"{key}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{key}.nin_shortcut", outputs, inputs, kernel=1)

    def middle(key: str, width: int) -> None:
        block(f"{key}.block_1", width, width)
        norm(f"{key}.attn_1.norm", width)
        for projection in ("q", "k", "v", "proj_out"):
            conv(f"{key}.attn_1.{projection}", width, width, kernel=1)
        block(f"{key}.block_2", width, width)

    conv("encoder.conv_in", first, IMAGE_CHANNELS)
    width = first
    for i, wide in enumerate(widths):
        for j in range(blocks):
            block(f"encoder.down.{i}.block.{j}", width, wide)
            width = wide
        if i < levels - 1:
            conv(f"encoder.down.{i}.downsample.conv", wide, wide)
    middle("encoder.mid", last)
    norm("encoder.norm_out", last)
    conv("encoder.conv_out", 2 * latent, last)  # mean and log-variance
    if facts["quant"]:
        conv("quant_conv", 2 * latent, 2 * latent, kernel=1)
        conv("post_quant_conv", latent, latent, kernel=1)
    conv("decoder.conv_in", last, latent)
    middle("decoder.mid", last)
    width = last
    for i, wide in reversed(list(enumerate(widths))):
        for j in range(blocks + 1):
            block(f"decoder.up.{i}.block.{j}", width, wide)
            width = wide
        if i > 0:
            conv(f"decoder.up.{i}.upsample.conv", wide, wide)
    norm("decoder.norm_out", first)
    conv("decoder.conv_out", IMAGE_CHANNELS, first)
    return table


# ------------------------------------------------------------------------------------------- plan and inputs


def check_plan(info: ModelInfo, plan: Plan) -> None:
    inputs.check_degrees_built(label, plan, ("patch",))
    if plan.patch != len(plan.devices):
        raise XditError(
            Code.BAD_PLAN,
            f"patch {plan.patch} is not {len(plan.devices)} devices; name as many devices as ranks share a picture.",
        )


def check_tile(info: ModelInfo, tile: int) -> None:
    """Refuses tiles whose overlap, a quarter of their side, is no whole number of latent pixels."""
    step = TILE_STEP * info.facts["scale"]
    if tile and (tile % step or tile < 2 * step):
        fits = max(2 * step, tile - tile % step)
        raise XditError(
            Code.BAD_VALUE,
            f"tile is {tile}; it must be a multiple of {step} from {2 * step} on: {fits} would work.",
        )


def check_decode(info: ModelInfo, latent: Tensor, out: Tensor | None = None, tile: int = 0) -> None:
    """latent [B, latent_channels, h, w] to out [B, h·scale, w·scale, 3], float32."""
    check_tile(info, tile)
    inputs.check_dtype("latent", latent)
    inputs.check_shape("latent", latent, ("B", info.facts["latent_channels"], "h", "w"))
    if out is not None:
        scale = info.facts["scale"]
        batch, _, height, width = latent.shape
        inputs.check_dtype("out", out, ("float32",))
        inputs.check_shape("out", out, (batch, height * scale, width * scale, IMAGE_CHANNELS))


def check_encode(info: ModelInfo, image: Tensor, out: Tensor | None = None, tile: int = 0) -> None:
    """image [B, H, W, 3], H and W multiples of scale, to out [B, latent_channels, H/scale, W/scale]."""
    check_tile(info, tile)
    inputs.check_dtype("image", image)
    inputs.check_shape("image", image, ("B", "H", "W", IMAGE_CHANNELS))
    scale = info.facts["scale"]
    batch, height, width, _ = image.shape
    if height % scale or width % scale:
        raise XditError(
            Code.BAD_TENSOR,
            f"image is {width} × {height}; width and height must be multiples of {scale}: crop it to "
            f"{width - width % scale} × {height - height % scale}.",
        )
    if out is not None:
        inputs.check_dtype("out", out)
        inputs.check_shape(
            "out", out, (batch, info.facts["latent_channels"], height // scale, width // scale)
        )
