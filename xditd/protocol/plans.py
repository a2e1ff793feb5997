"""What messages say of models and of plans: how a model is named, what its file was found to be, how it is to run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated

from msgspec import Meta, Struct, field, structs

from xditd.protocol.noise import Noise

Name = Annotated[str, Meta(max_length=1024)]
Degree = Annotated[int, Meta(ge=0, le=1024)]


class ModelRef(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model as ComfyUI names it."""

    kind: Name  # a ComfyUI folder: "diffusion_models", "unet", "checkpoints", "vae", "text_encoders", "clip"
    name: Name  # the file below it, as ComfyUI lists it: "flux/dev.safetensors"
    # of a checkpoint: "transformer" (what "" means there), "vae", "clip_l", "clip_g", "t5xxl",
    # "hydit_clip", "mt5xl"
    part: Name = ""
    dtype: Name = ""  # compute dtype: "bfloat16", "float16", "float32"; "" is the file's own
    size: Annotated[int, Meta(ge=0)] | None = (
        None  # bytes, where the sender knows: another size is another file
    )


class LoraRef(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A LoRA as ComfyUI names it, and how much of it."""

    name: Name  # the file below ComfyUI's models/loras: "style/ink.safetensors"
    strength: float = 1.0  # 0 is none of it; may be negative
    size: Annotated[int, Meta(ge=0)] | None = None  # bytes, as in ModelRef


Loras = Annotated[tuple[LoraRef, ...], Meta(max_length=64)]


class LoraMatch(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a LoRA's file was found to change of a model."""

    name: str
    strength: float
    matched: int  # modules of the model that it changes
    modules: int  # that it has a change for, without those of text encoders
    text: int = 0  # of text encoders, which this leaves as they are
    unmatched: tuple[str, ...] = ()  # a few of the names that the model has not


class PlanRequest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the sender asks of the planner; 0 and () leave it the choice."""

    strategy: Name = "auto"  # "auto", "USP", "CFG", "PipeFusion", "Tensor", "Hybrid"
    devices: tuple[
        Name, ...
    ] = ()  # names as `status` lists them, "cuda:0", "0", "0-3" or "cuda:0-3"; () is all that the daemon owns
    cfg: Degree = 0
    ulysses: Degree = 0
    ring: Degree = 0
    pipefusion: Degree = 0
    tensor: Degree = 0
    patch: Degree = 0
    replicas: Degree = 0  # groups that hold the model, each on its share of the devices; 0 is one
    scheduling: Name = (
        "round_robin"  # which of them takes a run: "least_loaded", "weighted_round_robin", "adaptive"
    )
    # where weights are outside of turns: "" always on the devices, "model" in the host's memory, all of them coming for a
    # turn, "layerwise" there as well, each layer coming before it runs
    offload: Name = ""
    shard: bool = (
        False  # ranks of ulysses and ring hold a share of the weights each, and gather a layer before it runs
    )
    # in what a transformer keeps its weights, to be cast to the compute dtype as each layer runs: "" the compute dtype itself,
    # "file" the fp8 of its file, "float8_e4m3fn" or "float8_e5m2" rounds all to that
    weight_dtype: Name = ""
    # of a plan that cannot be had: "auto" does it with fewer devices, "never" fails; "" is the daemon's own
    fallback: Name = ""


OFFLOADS = ("", "model", "layerwise")
"""What a plan's `offload` may be, and each takes less of the devices' memory than the one before."""

FP8 = ("float8_e4m3fn", "float8_e5m2")
"""The 8-bit floats that weights may be kept in, by torch's names."""

WEIGHT_DTYPES = ("", "file", *FP8)
"""What a plan's `weight_dtype` may be."""

LAYERS_AT_ONCE = 2
"""Layers that layerwise offload has on a device at one time, the one that runs and the next; and as many FSDP has gathered."""

DEGREES = ("cfg", "ulysses", "ring", "pipefusion", "tensor", "patch")
"""What a plan has degrees of, by the names of its fields, in the order in which they are told."""


class Plan(Struct, frozen=True, kw_only=True):
    """How a group runs its model. The product of the degrees is the number of devices."""

    devices: tuple[str, ...]
    cfg: int = 1
    ulysses: int = 1
    ring: int = 1
    pipefusion: int = 1
    tensor: int = 1
    patch: int = 1  # of a VAE: ranks that share each picture
    offload: str = ""  # "model" or "layerwise": as the request has it
    shard: bool = False  # as the request has it
    weight_dtype: str = ""  # as the request has it
    reason: str = ""  # one sentence: why the planner chose this


def degrees_of(plan: Plan | PlanRequest) -> dict[str, int]:
    """Those above 1, by name."""
    return {name: degree for name in DEGREES if (degree := getattr(plan, name)) > 1}


def spell_degrees(degrees: Mapping[str, int]) -> str:
    """ "ulysses 2 × ring 2"; "" of none."""
    return " × ".join(f"{name} {degree}" for name, degree in degrees.items())


def spell_weights(plan: Plan | PlanRequest) -> str:
    """ "float8_e5m2", "the file's fp8": in what weights are kept; "" where that is what they are computed in."""
    return "the file's fp8" if plan.weight_dtype == "file" else plan.weight_dtype


def shape(plan: Plan) -> Plan:
    """The plan without its devices and the reason for it: two of one shape do the same, wherever."""
    return structs.replace(plan, devices=(), reason="")


class ModelInfo(Struct, frozen=True, kw_only=True):
    """A file that the daemon can load, as its header tells."""

    kind: str
    name: str
    part: str
    family: str  # "flux", "autoencoder_kl", ...
    variant: str  # "dev", "schnell", ...
    dtype: str  # of most of its parameters
    bytes: int  # of the file
    parameters: int
    facts: dict[str, int] = field(default_factory=dict)  # widths, depths, heads: what the shapes say
    noise: Noise | None = None  # of a transformer: what it takes out of a latent


class SkippedFile(Struct, frozen=True, kw_only=True):
    """A file below a model root that the daemon can not load, and why."""

    kind: str
    name: str
    code: str
    message: str


def spread_devices(name: str) -> tuple[str, ...]:
    """Of a name in `PlanRequest.devices`: "0-3" is "0", "1", "2", "3", and "cuda:2-3" is "cuda:2", "cuda:3"; any other is itself,
    also a span from its end to its beginning."""
    span = re.fullmatch(r"([a-z]+:)?([0-9]{1,4})-([0-9]{1,4})", name)
    if span is None or int(span[3]) < int(span[2]):
        return (name,)
    return tuple(f"{span[1] or ''}{number}" for number in range(int(span[2]), int(span[3]) + 1))
