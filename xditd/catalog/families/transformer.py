"""Checks that the families of transformers share: of plans, latents, texts and loops. None knows a family."""

from __future__ import annotations

import math
from collections.abc import Mapping

from xditd.catalog.families import inputs
from xditd.catalog.families.family import Kinds
from xditd.catalog.sentences import shape_of
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelInfo, Plan, Sample
from xditd.protocol.noise import Noise
from xditd.protocol.samplers import PIPELINED
from xditd.protocol.tensors import Tensor

Conditioning = Mapping[str, Tensor]

PATCH = 2
"""Latent pixels of a token's side, in every family whose tokens are dealt out."""


def check_plan(info: ModelInfo, plan: Plan, label: str, blocks: int) -> None:
    """Refuses what is neither cfg, nor ring, nor tensor and ulysses of degrees that divide the heads, nor pipefusion.

    Args:
        blocks: that can be dealt out to stages of pipefusion.

    Raises:
        XditError: `not_built`, `bad_plan` with the degrees that would work.
    """
    inputs.check_degrees_built(label, plan, ("cfg", "ulysses", "ring", "tensor", "pipefusion"))
    if plan.pipefusion > 1:
        _check_pipeline(info, plan, blocks)
    heads = info.facts["heads"]
    if heads % plan.tensor:
        raise XditError(
            Code.BAD_PLAN,
            f"tensor {plan.tensor} does not divide the {heads} heads of {info.name}; {_divisors(heads)} would, and ring "
            "takes any degree.",
        )
    if heads // plan.tensor % plan.ulysses:
        of = f"{heads} heads of {info.name}"
        if plan.tensor > 1:
            of = f"{heads // plan.tensor} heads that tensor {plan.tensor} leaves each rank of {info.name}"
        raise XditError(
            Code.BAD_PLAN,
            f"ulysses {plan.ulysses} does not divide the {of}; {_divisors(heads // plan.tensor)} would, and ring takes "
            "any degree.",
        )


def _check_pipeline(info: ModelInfo, plan: Plan, blocks: int) -> None:
    beside = [name for name in ("ulysses", "ring", "tensor") if getattr(plan, name) > 1]
    if beside:
        raise XditError(
            Code.NOT_BUILT,
            f"pipefusion together with {' and '.join(beside)} is not built in this version; pipefusion with cfg is, and "
            "ulysses, ring and tensor without pipefusion.",
        )
    if plan.pipefusion > blocks:
        raise XditError(
            Code.BAD_PLAN,
            f"pipefusion {plan.pipefusion} needs as many blocks, and {info.name} has {blocks}; up to {blocks} would work.",
        )


def _divisors(heads: int) -> str:
    return ", ".join(str(degree) for degree in range(1, heads + 1) if heads % degree == 0)


def check_pipelined_step(plan: Plan) -> None:
    """Refuses a step by itself under a plan whose stages overlap steps.

    Raises:
        XditError: `bad_plan`.
    """
    if plan.pipefusion > 1:
        raise XditError(
            Code.BAD_PLAN,
            f"pipefusion {plan.pipefusion} computes steps that overlap, and so a whole sampling at once: use `sample` (in "
            "ComfyUI: loop daemon), or for `denoise` a plan without it, as the strategies USP and Tensor make.",
        )


def check_pipelined_loop(plan: Plan, message: Sample) -> None:
    """Refuses a sampling that such a plan cannot do.

    Raises:
        XditError: `bad_value`.
    """
    if plan.pipefusion > 1 and message.sampler not in PIPELINED:
        raise XditError(
            Code.BAD_VALUE,
            f"Under pipefusion the ranks do not run the sampler {message.sampler!r}; they run {', '.join(PIPELINED)}.",
        )


def check_tokens(
    what: str, plan: Plan, attention: tuple[Kinds, ...], x: Tensor, conditioning: Conditioning
) -> None:
    """Refuses a latent with so few tokens that a ring rank would have none, whose attention cannot be merged with others'.

    Args:
        what: the latent is.
        attention: as the family has it: `family.Transformer.attention`.

    Raises:
        XditError: `bad_tensor` with the ring that would work.
    """
    for kinds in attention:
        # Each kind is dealt out in order, as evenly as can be: so the last ring rank has one where one is left for it.
        counts = [conditioning["context"].shape[1] if kind == "text" else _tokens(x) for kind in kinds]
        most = (max(counts) - 1) // plan.ulysses + 1
        if plan.ring > most:
            told = " and ".join(f"{count} {kind}" for count, kind in zip(counts, kinds, strict=True))
            raise XditError(
                Code.BAD_TENSOR,
                f"{what} has shape {shape_of(x.shape)}, and its {told} tokens are too few for ring {plan.ring}"
                f"{f' with ulysses {plan.ulysses}' if plan.ulysses > 1 else ''}; ring {most} would work, and so would a "
                "larger picture.",
            )


def _tokens(x: Tensor) -> int:
    return math.prod(math.ceil(side / PATCH) for side in x.shape[2:])


def check_batches(tensors: Conditioning) -> None:
    """Refuses tensors of one conditioning whose batches are neither equal nor 1.

    Raises:
        XditError: `bad_tensor`.
    """
    first: tuple[str, int] | None = None
    for name, tensor in tensors.items():
        batch = tensor.shape[0]
        if first is not None and batch not in (1, first[1]):
            raise XditError(
                Code.BAD_TENSOR,
                f"{first[0]} has batch {first[1]} and {name} {batch}; they must be equal, or one of them 1.",
            )
        if batch != 1 and first is None:
            first = name, batch


def check_latent(what: str, info: ModelInfo, x: Tensor, conditioning: Conditioning) -> None:
    """Refuses another latent than [B, latent_channels, H, W], and one beside a conditioning of another batch.

    Raises:
        XditError: `bad_tensor`.
    """
    inputs.check_dtype(what, x)
    inputs.check_shape(what, x, ("B", info.facts["latent_channels"], "H", "W"))
    for key, tensor in conditioning.items():
        inputs.check_batch(key, tensor, x.shape[0])


def check_sample(
    info: ModelInfo,
    message: Sample,
    conditioning: Conditioning,
    negative: Conditioning | None,
    noise: Noise,
) -> None:
    """noise [B, latent_channels, H, W]; sigmas from the highest of the kind of noise to 0; latent, out and previews shaped
    as noise.

    Raises:
        XditError: `bad_value`, `bad_tensor`.
    """
    inputs.check_loop(message, noise.highest)
    check_latent("noise", info, message.noise, conditioning)
    if negative is not None:
        check_latent("noise", info, message.noise, negative)
    inputs.check_same_shape("latent", message.latent, message.noise, "noise")
    inputs.check_same_shape("out", message.out, message.noise, "noise")
    for i, preview in enumerate(message.previews):
        inputs.check_same_shape(f"preview {i}", preview, message.noise, "noise")
