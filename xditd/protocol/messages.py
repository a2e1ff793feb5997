"""The messages between a client and the daemon, version 1. protocol.md explains each; a test holds them together.

Requests carry an `id` that the client chooses; every answer and event names it in `re`. A request is answered
exactly once, by its answer or by `failed`. Events (`queued`, `progress`, `rebound`, `happened`) may come before the answer;
`run_ended` comes unasked. Unknown fields are ignored, unknown types are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Union

from msgspec import Meta, Struct, field

from xditd.protocol.codec import tags
from xditd.protocol.figures import DeviceStatus
from xditd.protocol.tensors import Tensor

VERSION = 1
"""The protocol version that this code speaks."""

VERSIONS = (1, 1)
"""The oldest and the newest version that this code understands."""

Id = Annotated[int, Meta(ge=0, le=2**53)]
Key = Annotated[str, Meta(min_length=1, max_length=128)]
Name = Annotated[str, Meta(max_length=1024)]
Degree = Annotated[int, Meta(ge=0, le=1024)]


# --------------------------------------------------------------------------------- what the messages speak of


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


class RankStatus(Struct, frozen=True, kw_only=True):
    """One rank process."""

    rank: int
    pid: int
    device: str
    phase: str  # "starting", "importing", "joining", "loading", "ready", "gone"
    rss: int | None = None  # bytes of host memory
    device_memory: int | None = None  # bytes that torch reserves on its device
    attention: str = ""  # attention backend


class GroupStatus(Struct, frozen=True, kw_only=True):
    """One group of ranks."""

    group: str
    generation: int
    state: str
    model: ModelRef
    family: str
    variant: str
    dtype: str
    plan: Plan
    ranks: tuple[RankStatus, ...]
    runs: int = 0
    turns: int = 0  # turns answered since it was ready
    seconds: float | None = None  # it took to become ready
    problem: str = ""  # why it failed, where it did


class RunStatus(Struct, frozen=True, kw_only=True):
    """One run."""

    run: int
    state: str
    model: ModelRef
    group: str = ""
    label: str = ""
    client: str = ""
    step: int = 0
    total: int = 0  # 0 where the client drives the steps
    position: int = 0  # in the queue; 0 is running
    age: float = 0.0  # seconds
    rebinds: int = 0


class ArenaStatus(Struct, frozen=True, kw_only=True):
    """The shared memory of one client."""

    client: str
    pid: int
    uid: int
    segments: int
    bytes: int


class Limits(Struct, frozen=True, kw_only=True):
    """What the daemon accepts."""

    header_bytes: int
    frames: int
    frame_bytes: int
    arena_bytes: int  # of one client
    runs: int  # open at once, of one client
    queue: int  # runs waiting, of all clients


# --------------------------------------------------------------------------------------------------- requests


class Hello(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="hello", tag_field="type"):
    """The first message of a connection."""

    id: Id
    versions: tuple[int, int]  # oldest and newest protocol version understood
    client: Name = ""  # a name for people, "ComfyUI 0.3.64"
    pid: int = 0
    token: Name = ""  # the nonce from the arena socket; "" sends tensors as frames


class Status(Struct, frozen=True, kw_only=True, tag="status", tag_field="type"):
    id: Id


class Models(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="models", tag_field="type"):
    id: Id
    kind: Name = ""  # "" is every kind


class Load(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="load", tag_field="type"):
    """Have the model ready under the plan; answered when it is."""

    id: Id
    model: ModelRef
    plan: PlanRequest = field(default_factory=PlanRequest)


class Unload(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="unload", tag_field="type"):
    """End groups: those of a model, or the one named. With runs on them only if `force`."""

    id: Id
    model: ModelRef | None = None
    group: Name = ""
    force: bool = False


class OpenRun(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="open_run", tag_field="type"):
    """Queue a run; answered when it is bound to a ready group."""

    id: Id
    model: ModelRef
    plan: PlanRequest = field(default_factory=PlanRequest)
    label: Annotated[str, Meta(max_length=256)] = ""


class PutConditioning(
    Struct, frozen=True, kw_only=True, omit_defaults=True, tag="put_conditioning", tag_field="type"
):
    """Give the run a conditioning under a key.

    Its slots must stay as they are until the run has ended, or until the key has another and a turn asked after that
    is answered.
    """

    id: Id
    run: Id
    key: Key
    tensors: dict[str, Tensor]
    values: dict[str, float] = field(default_factory=dict)


class DenoiseItem(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One call of the denoiser."""

    x: Tensor  # what ComfyUI hands its diffusion model, [B, C, H, W]
    t: tuple[float, ...]  # per family, of length 1 or B; see protocol.md
    conditioning: Key
    out: Tensor | None = None  # where the prediction goes, shaped as x; None answers with a frame


class Denoise(Struct, frozen=True, kw_only=True, tag="denoise", tag_field="type"):
    """One turn: all items are answered together."""

    id: Id
    run: Id
    items: Annotated[tuple[DenoiseItem, ...], Meta(min_length=1, max_length=16)]


class Sample(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="sample", tag_field="type"):
    """The whole sampling loop in the ranks, a turn per step."""

    id: Id
    run: Id
    sampler: Name  # "euler", "heun", "dpmpp_2m", "ddim"
    sigmas: Annotated[tuple[float, ...], Meta(min_length=2, max_length=4096)]  # descending; the last may be 0
    noise: Tensor  # of unit variance, [B, C, H, W]
    conditioning: Key
    latent: Tensor | None = None  # in the model's own scale (after process_latent_in); None is zeros
    negative: Key | None = None
    cfg: float = 1.0
    out: Tensor | None = None
    previews: tuple[Tensor, ...] = ()  # slots that x0 is written to in turn, shaped as noise
    preview_frames: bool = False  # without slots: x0 comes as a frame of each `progress`


class Decode(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="decode", tag_field="type"):
    """VAE: latent [B, C, h, w], unscaled as ComfyUI's LATENT, to image [B, H, W, 3] in 0..1."""

    id: Id
    run: Id
    latent: Tensor
    clamp: bool = True  # to 0..1
    out: Tensor | None = None


class Encode(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="encode", tag_field="type"):
    """VAE: image [B, H, W, 3] in 0..1 to latent [B, C, h, w], unscaled."""

    id: Id
    run: Id
    image: Tensor
    out: Tensor | None = None


class EncodeText(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="encode_text", tag_field="type"):
    """Text encoder: tokens [B, n] to hidden states [B, n, width], and a pooled output [B, width]."""

    id: Id
    run: Id
    tokens: Tensor  # int32 or int64; -1 - i is row i of vectors
    vectors: Tensor | None = None  # [k, width]
    mask: Tensor | None = None  # [B, n], 1 is attended to; None is all
    layer: int | None = None  # whose hidden state; None is the last one's, after the final norm
    final_norm: bool = True  # whether that of another layer goes through it too
    pooled: Name = "none"  # "plain", "projected"
    out: Tensor | None = None
    pooled_out: Tensor | None = None


class Cancel(Struct, frozen=True, kw_only=True, tag="cancel", tag_field="type"):
    """End the run: at once if it waits, after the step it is in otherwise."""

    id: Id
    run: Id


class Close(Struct, frozen=True, kw_only=True, tag="close", tag_field="type"):
    """End the run, after the step it may be in, and forget its conditioning."""

    id: Id
    run: Id


class Drain(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="drain", tag_field="type"):
    """Take no new runs; answered when the open ones have ended. With `stop`, the daemon then ends."""

    id: Id
    stop: bool = False


class Watch(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="watch", tag_field="type"):
    """Be told what happens; answered after `count` events, by another watch, or when the daemon stops."""

    id: Id
    after: Id | None = None  # number of the last event that is known; None: from now on, 0: all that is kept
    count: Annotated[int, Meta(ge=1, le=256)] = 64


Request = Union[
    Hello,
    Status,
    Models,
    Load,
    Unload,
    OpenRun,
    PutConditioning,
    Denoise,
    Sample,
    Decode,
    Encode,
    EncodeText,
    Cancel,
    Close,
    Drain,
    Watch,
]
REQUESTS = tags(Request)


# --------------------------------------------------------------------------------------------------- answers


class Welcome(Struct, frozen=True, kw_only=True, tag="welcome", tag_field="type"):
    re: Id
    version: int  # the protocol version that both speak
    daemon: str  # the daemon's own version
    epoch: str  # another one means the daemon was restarted: all runs are lost
    capabilities: tuple[str, ...]
    limits: Limits


class StatusReport(Struct, frozen=True, kw_only=True, tag="status_report", tag_field="type"):
    re: Id
    state: str
    version: str
    epoch: str
    pid: int
    uptime: float  # seconds
    devices: tuple[DeviceStatus, ...]
    groups: tuple[GroupStatus, ...]
    runs: tuple[RunStatus, ...]
    arenas: tuple[ArenaStatus, ...]
    arena_bytes: int  # in use by all clients
    arena_limit: int
    clients: int = 0  # connected


class ModelList(Struct, frozen=True, kw_only=True, tag="model_list", tag_field="type"):
    re: Id
    models: tuple[ModelInfo, ...]
    skipped: tuple[SkippedFile, ...] = ()
    roots: tuple[str, ...] = ()
    more: int = 0  # files that the header limit cut off


class Loaded(Struct, frozen=True, kw_only=True, tag="loaded", tag_field="type"):
    re: Id
    group: str
    plan: Plan
    model: ModelInfo
    dtype: str  # that it computes in
    seconds: float
    warm: bool  # it was ready before


class Unloaded(Struct, frozen=True, kw_only=True, tag="unloaded", tag_field="type"):
    re: Id
    groups: tuple[str, ...]


class RunOpened(Struct, frozen=True, kw_only=True, tag="run_opened", tag_field="type"):
    re: Id
    run: Id
    group: str
    plan: Plan
    model: ModelInfo


class ConditioningPut(Struct, frozen=True, kw_only=True, tag="conditioning_put", tag_field="type"):
    re: Id
    run: Id
    key: str


class Denoised(Struct, frozen=True, kw_only=True, tag="denoised", tag_field="type"):
    re: Id
    outputs: tuple[Tensor, ...]
    seconds: float  # the ranks took


class Sampled(Struct, frozen=True, kw_only=True, tag="sampled", tag_field="type"):
    re: Id
    latent: Tensor  # in the model's own scale
    steps: int
    seconds: float


class Decoded(Struct, frozen=True, kw_only=True, tag="decoded", tag_field="type"):
    re: Id
    image: Tensor
    seconds: float


class Encoded(Struct, frozen=True, kw_only=True, tag="encoded", tag_field="type"):
    re: Id
    latent: Tensor
    seconds: float


class TextEncoded(
    Struct, frozen=True, kw_only=True, omit_defaults=True, tag="text_encoded", tag_field="type"
):
    re: Id
    hidden: Tensor
    pooled: Tensor | None = None
    seconds: float


class Cancelled(Struct, frozen=True, kw_only=True, tag="cancelled", tag_field="type"):
    re: Id
    run: Id


class Closed(Struct, frozen=True, kw_only=True, tag="closed", tag_field="type"):
    re: Id
    run: Id


class Drained(Struct, frozen=True, kw_only=True, tag="drained", tag_field="type"):
    re: Id


class Watched(Struct, frozen=True, kw_only=True, tag="watched", tag_field="type"):
    re: Id
    last: Id  # number of the last event that was told: the next watch's `after`


class Failed(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="failed", tag_field="type"):
    re: Id | None  # None where the request's id could not be read
    code: str
    message: str
    details: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------- events


class Queued(Struct, frozen=True, kw_only=True, tag="queued", tag_field="type"):
    """Before `run_opened` or `loaded`: what it waits for."""

    re: Id
    run: Id | None
    position: int  # runs before it; 0 is next
    phase: str  # "waiting", or the group's slowest rank's: "importing", "joining", "loading"


class Progress(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="progress", tag_field="type"):
    """Before `sampled`: a step is done."""

    re: Id
    run: Id
    step: int  # 1 to total
    total: int
    sigma: float  # that the step went to
    preview: Tensor | None = None  # x0, in the model's own scale


class Rebound(Struct, frozen=True, kw_only=True, tag="rebound", tag_field="type"):
    """The run's group died; the run goes on in another, and what it was asked is asked again."""

    re: Id
    run: Id
    group: str
    reason: str


class RunEnded(Struct, frozen=True, kw_only=True, tag="run_ended", tag_field="type"):
    """The daemon ended a run that had nothing under way."""

    run: Id
    code: str
    message: str


class Happened(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="happened", tag_field="type"):
    """Before `watched`: something has happened."""

    re: Id
    number: Id  # one more than that of the event before; a gap tells of events that are not kept any more
    time: float  # seconds since 1970
    event: str  # "group_ready", "run_ended", ...; see protocol.md
    group: str = ""
    generation: int = 0
    model: ModelRef | None = None
    run: Id | None = None
    client: str = ""
    code: str = ""  # of what failed, or ended otherwise than it should
    message: str = ""  # one sentence for people


Reply = Union[
    Welcome,
    StatusReport,
    ModelList,
    Loaded,
    Unloaded,
    RunOpened,
    ConditioningPut,
    Denoised,
    Sampled,
    Decoded,
    Encoded,
    TextEncoded,
    Cancelled,
    Closed,
    Drained,
    Watched,
    Failed,
    Queued,
    Progress,
    Rebound,
    Happened,
    RunEnded,
]
REPLIES = tags(Reply)
EVENTS = frozenset({"queued", "progress", "rebound", "happened", "run_ended"})
