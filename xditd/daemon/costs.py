"""How long a step takes under a plan: a model of costs, made better by steps that were measured. Pure.

A step's seconds are its arithmetic at the device's speed, over the ranks that share it, and what is sent over the links. Arithmetic:
two operations for each weight and token of the blocks' linear layers, 4·N²·width a block for attention over N tokens. What is
sent, of p tokens of hidden size hs in L blocks over n ranks, is the table of xDiT (arXiv 2411.01738 and the README of its repository):
tensor 4·p·hs·L, Ulysses 4/n·p·hs·L, ring 2·p·hs·L behind the attention, PipeFusion 2·p·hs behind everything; here each times the (n − 1)/n
that leaves a rank. Ranks that share weights gather each layer's behind the layer before it (FSDP2): what computing does not hide is waited for. Every message costs its latency, too. The text's part, norms, kernels' starts and what is computed outside of blocks are
left out: a measured step makes up for them, since its ratio to this model corrects the estimates of other plans.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from xditd.catalog.detection import role
from xditd.catalog.families.transformer import PATCH
from xditd.protocol.plans import ModelInfo, Plan, shape
from xditd.protocol.tensors import ITEMSIZE

PATCHES_STARTED = 2
"""Messages of a patch of PipeFusion that nothing hides: into a stage and out of it."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one kind of device.

    Attributes:
        flops: operations in a second, as a transformer reaches them in 16 bits.
        link: bytes in a second that a rank sends to another of the machine.
        latency: seconds that a message takes besides.
    """

    flops: float
    link: float
    latency: float


REACHED = 0.5
"""Share of the makers' dense 16-bit figure that a transformer reaches: 0.43 eager and 0.58 compiled on one H200 (bench/step_overhead)."""

NVLINK, PCIE = 20e-6, 40e-6

SPEEDS: Mapping[str, Speed] = {
    # Dense 16-bit FLOPS and bandwidth each way by the makers' data sheets; of a link, 0.7 is taken for reached.
    "B200": Speed(2250e12 * REACHED, 900e9 * 0.7, NVLINK),
    "H200": Speed(989e12 * REACHED, 450e9 * 0.7, NVLINK),
    "H100 PCIe": Speed(756e12 * REACHED, 64e9 * 0.7, PCIE),
    "H100": Speed(989e12 * REACHED, 450e9 * 0.7, NVLINK),
    "H20": Speed(148e12 * REACHED, 450e9 * 0.7, NVLINK),
    "A100-PCIE": Speed(312e12 * REACHED, 32e9 * 0.7, PCIE),
    "A100": Speed(312e12 * REACHED, 300e9 * 0.7, NVLINK),
    "L40": Speed(181e12 * REACHED, 32e9 * 0.7, PCIE),
    "L20": Speed(119e12 * REACHED, 32e9 * 0.7, PCIE),
    "RTX 5090": Speed(210e12 * REACHED, 64e9 * 0.7, PCIE),
    "RTX 4090": Speed(165e12 * REACHED, 32e9 * 0.7, PCIE),
    "RTX 3090": Speed(71e12 * REACHED, 32e9 * 0.7, PCIE),
    "CPU": Speed(50e9, 2e9, 200e-6),
}
"""By a part of the device's name; the first that is in it counts."""


def speed_of(device: str) -> Speed | None:
    """Of a device by its model's name ("NVIDIA H100 80GB HBM3"); None of one that is in no table."""
    return next((speed for part, speed in SPEEDS.items() if part in device), None)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a transformer on one picture.

    Attributes:
        linear, attention: operations.
        blocks: that communicate.
        tokens: that are dealt out.
        width: of a token.
    """

    linear: float
    attention: float
    blocks: int
    tokens: int
    width: int


TEXT = {"flux": 512, "sd3": 154 + 77, "pixart": 120, "hunyuandit": 333}
"""Text tokens that a family's pipeline usually makes."""

CALLS = {"flux": 1}
"""Calls of a step, where guidance does not make two of it."""


def tokens_of(info: ModelInfo, size: tuple[int, int]) -> int:
    """Of a picture of so many pixels; 0 where a side has none."""
    side = info.facts.get("scale", 8) * PATCH
    return math.prod(math.ceil(pixels / side) for pixels in size)


def call_of(info: ModelInfo, size: tuple[int, int]) -> Call | None:
    """One call on a picture of so many pixels; None for a model whose costs are not modelled (a UNet, a VAE, an encoder of text)."""
    image = tokens_of(info, size)
    if info.family not in TEXT or not image:
        return None
    facts, text = info.facts, TEXT[info.family]
    width = facts.get("width") or facts["heads"] * facts["head_dim"]
    if info.family in ("flux", "sd3"):  # one sequence of text and image
        blocks = facts["double_blocks"] + facts["single_blocks"] if info.family == "flux" else facts["blocks"]
        tokens = image + text
        linear, attention = 24.0 * width**2 * tokens * blocks, 4.0 * tokens**2 * width * blocks
        dual = facts.get("dual_blocks", 0)  # attend to the image once more
        linear, attention = linear + 8.0 * width**2 * image * dual, attention + 4.0 * image**2 * width * dual
        return Call(linear, attention, blocks, tokens, width)
    blocks, inner = facts["blocks"], facts.get("ff", 4 * width)
    of_image = (
        8 * width**2 + 4 * width**2 + 4 * width * inner
    )  # attention, half of cross-attention, feed-forward
    skips = 4 * width**2 * (blocks // 2) if info.family == "hunyuandit" else 0
    linear = float((of_image * blocks + skips) * image + 4 * width**2 * text * blocks)
    return Call(linear, 4.0 * image * (image + text) * width * blocks, blocks, image, width)


def calls_of(info: ModelInfo) -> int:
    return CALLS.get(info.family, 2)


def step(info: ModelInfo, plan: Plan, size: tuple[int, int], dtype: str, speed: Speed) -> float | None:
    """Seconds of one step under a plan; None where `call_of` has none."""
    call = call_of(info, size)
    if call is None:
        return None
    calls = math.ceil(calls_of(info) / plan.cfg)
    sequence = plan.ulysses * plan.ring
    shared = sequence * plan.tensor * plan.pipefusion
    computed = (call.linear + call.attention) / shared / speed.flops
    waits = _sent(call, plan, ITEMSIZE[dtype], speed)
    if plan.shard:
        waits += _gathered(info.parameters * ITEMSIZE[dtype], call.blocks, sequence, computed, speed)
    return calls * (computed + waits) + (plan.cfg > 1) * speed.latency


def _gathered(weights: float, blocks: int, ranks: int, computed: float, speed: Speed) -> float:
    """Seconds of one call for which ranks wait for weights that they share: the first layer's, and what computing does not hide.

    Args:
        weights: bytes of all ranks' shares.
        computed: seconds of the call's own work.
    """
    layer = weights * (ranks - 1) / ranks / blocks / speed.link + speed.latency
    return layer + max(0.0, (blocks - 1) * layer - computed)


def _sent(call: Call, plan: Plan, itemsize: int, speed: Speed) -> float:
    """Seconds of one call for which ranks wait for what is sent."""
    hidden = call.tokens * call.width * itemsize
    waits = 0.0

    def message(nbytes: float) -> float:
        return nbytes / speed.link + speed.latency

    if plan.ulysses > 1:
        share = hidden / (plan.ulysses * plan.ring * plan.tensor)
        away = share * (plan.ulysses - 1) / plan.ulysses
        waits += call.blocks * 4 * message(away)
    if plan.ring > 1:
        share = hidden / (plan.ring * plan.tensor) / max(plan.ulysses, 1)
        hides = call.attention / call.blocks / (plan.ulysses * plan.ring * plan.tensor) / speed.flops
        sent = (plan.ring - 1) * message(2 * share)
        # What attention does not hide is waited for; to merge the parts costs a message's latency each.
        waits += call.blocks * (max(0.0, sent - hides) + (plan.ring - 1) * speed.latency)
    if plan.tensor > 1:
        share = hidden / (plan.ulysses * plan.ring)
        waits += call.blocks * 2 * message(2 * share * (plan.tensor - 1) / plan.tensor)
    if plan.pipefusion > 1:
        waits += plan.pipefusion * PATCHES_STARTED * speed.latency
    return waits


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of a step. `basis`: "measured" under this plan, "calibrated" by a step under another, "estimate" by the tables alone."""

    seconds: float
    basis: str


def estimate(
    info: ModelInfo,
    plan: Plan,
    size: tuple[int, int],
    dtype: str,
    device: str,
    measured: Sequence[tuple[Plan, float]] = (),
) -> Estimate | None:
    """A step's seconds, by measured ones where there are any.

    Args:
        device: the model's name of the plan's devices.
        measured: seconds of a step of this size, by the plan that it was done under.

    Returns:
        None where neither the model nor a measurement tells, and of a VAE or a text encoder.
    """
    if not all(size) or role(info.part) != "transformer":
        return None  # nothing else has steps; and a picture of a VAE is no measure of one
    for other, seconds in measured:
        if shape(other) == shape(plan):
            return Estimate(seconds, "measured")
    speed = speed_of(device)
    if speed is None or plan.offload or plan.weight_dtype:
        return None
    told = step(info, plan, size, dtype, speed)
    if told is None:
        return None
    ratios = sorted(
        seconds / modelled
        for other, seconds in measured
        if not (other.offload or other.weight_dtype) and (modelled := step(info, other, size, dtype, speed))
    )
    if not ratios:
        return Estimate(told, "estimate")
    return Estimate(told * ratios[len(ratios) // 2], "calibrated")
