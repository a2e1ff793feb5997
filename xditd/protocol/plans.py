"""What messages say of models and of plans: how a model is named, what its file was found to be, how it is to run."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct, field

Name = Annotated[str, Meta(max_length=1024)]
Degree = Annotated[int, Meta(ge=0, le=1024)]


class ModelRef(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model as ComfyUI names it."""

    kind: Name  # a ComfyUI folder: "diffusion_models", "unet", "checkpoints", "vae", "text_encoders", "clip"
    name: Name  # the file below it, as ComfyUI lists it: "flux/dev.safetensors"
    # of a checkpoint: "transformer" (what "" means there), "vae", "clip_l", "clip_g", "t5xxl"
    part: Name = ""
    dtype: Name = ""  # compute dtype: "bfloat16", "float16", "float32"; "" is the file's own
    size: Annotated[int, Meta(ge=0)] | None = (
        None  # bytes, where the sender knows: another size is another file
    )


class PlanRequest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the sender asks of the planner; 0 and () leave it the choice."""

    strategy: Name = "auto"  # "auto", "USP", "CFG", "PipeFusion", "Tensor", "Hybrid"
    devices: tuple[
        Name, ...
    ] = ()  # names as `status` lists them, "0" or "cuda:0"; () is all that the daemon owns
    cfg: Degree = 0
    ulysses: Degree = 0
    ring: Degree = 0
    pipefusion: Degree = 0
    tensor: Degree = 0
    replicas: Degree = 0  # groups that hold the model, each on its share of the devices; 0 is one
    scheduling: Name = (
        "round_robin"  # which of them takes a run: "least_loaded", "weighted_round_robin", "adaptive"
    )


class Plan(Struct, frozen=True, kw_only=True):
    """How a group runs its model. The product of the degrees is the number of devices."""

    devices: tuple[str, ...]
    cfg: int = 1
    ulysses: int = 1
    ring: int = 1
    pipefusion: int = 1
    tensor: int = 1
    reason: str = ""  # one sentence: why the planner chose this


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


class SkippedFile(Struct, frozen=True, kw_only=True):
    """A file below a model root that the daemon can not load, and why."""

    kind: str
    name: str
    code: str
    message: str
