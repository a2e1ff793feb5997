"""The messages between a client and the daemon, version 1. protocol.md explains each; a test holds them together.

Requests carry an `id` that the client chooses; every answer and event names it in `re`. A request is answered
exactly once, by its answer or by `failed`. Events (`queued`, `progress`, `rebound`, `happened`) may come before the answer;
`run_ended` comes unasked. Unknown fields are ignored, unknown types are refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Union

from msgspec import Meta, Struct, field

from xditd.protocol.codec import tags
from xditd.protocol.explaining import Explain, Explained
from xditd.protocol.figures import (
    ArenaStatus,
    DeviceStatus,
    GroupStatus,
    MemoryStatus,
    NurseryStatus,
    PreloadStatus,
    RunStatus,
)
from xditd.protocol.plans import (
    LoraMatch,
    Loras,
    ModelInfo,
    ModelRef,
    Name,
    Plan,
    PlanRequest,
    SkippedFile,
)
from xditd.protocol.tensors import Tensor
from xditd.protocol.watching import Happened, Watch, Watched

VERSION = 1
"""The protocol version that this code speaks."""

VERSIONS = (1, 1)
"""The oldest and the newest version that this code understands."""

Id = Annotated[int, Meta(ge=0, le=2**53)]
Key = Annotated[str, Meta(min_length=1, max_length=128)]


# --------------------------------------------------------------------------------- what the messages speak of


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
    lora: Loras = ()  # that runs will have: looked at now, merged for a run


class Unload(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="unload", tag_field="type"):
    """End groups: those of a model, or the one named. With runs on them only if `force`."""

    id: Id
    model: ModelRef | None = None
    group: Name = ""
    force: bool = False


class Sleep(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="sleep", tag_field="type"):
    """Have groups that no run uses give their devices' memory back and keep the weights in the host's."""

    id: Id
    model: ModelRef | None = None
    group: Name = ""


class FreeMemory(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="free_memory", tag_field="type"):
    """End models that no run uses, those that are worth least first, until each device has so many bytes back."""

    id: Id
    bytes: Annotated[int, Meta(ge=0, le=2**53)] = 0  # 0 is all that can be given back
    devices: tuple[Name, ...] = ()  # () is all


class OpenRun(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="open_run", tag_field="type"):
    """Queue a run; answered when it is bound to a ready group."""

    id: Id
    model: ModelRef
    plan: PlanRequest = field(default_factory=PlanRequest)
    label: Annotated[str, Meta(max_length=256)] = ""
    priority: Annotated[int, Meta(ge=-2, le=2)] = 0
    lora: Loras = ()  # merged into the model's weights for its turns, in this order


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
    # Of a plan with pipefusion, else of no effect: first steps that are computed exactly, and patches of the image
    # after them; 0 patches are as many as stages.
    warmup: Annotated[int, Meta(ge=1, le=4096)] = 1
    patches: Annotated[int, Meta(ge=0, le=1024)] = 0


class Decode(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="decode", tag_field="type"):
    """VAE: latent [B, C, h, w], unscaled as ComfyUI's LATENT, to image [B, H, W, 3] in 0..1."""

    id: Id
    run: Id
    latent: Tensor
    clamp: bool = True  # to 0..1
    out: Tensor | None = None
    # side of the tiles in pixels; 0 is whole; None is whole, and in tiles where memory runs out and less may be had
    tile: Annotated[int, Meta(ge=0, le=65536)] | None = None


class Encode(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="encode", tag_field="type"):
    """VAE: image [B, H, W, 3] in 0..1 to latent [B, C, h, w], unscaled."""

    id: Id
    run: Id
    image: Tensor
    out: Tensor | None = None
    tile: Annotated[int, Meta(ge=0, le=65536)] | None = None  # as in Decode


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


class Goodbye(Struct, frozen=True, kw_only=True, tag="goodbye", tag_field="type"):
    """The last message of a connection: its runs end, and the daemon forgets it."""

    id: Id


Request = Union[
    Hello,
    Status,
    Models,
    Explain,
    Load,
    Unload,
    Sleep,
    FreeMemory,
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
    Goodbye,
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
    preloads: tuple[PreloadStatus, ...] = ()  # models that the configuration wants ready
    nursery: NurseryStatus | None = None


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
    groups: tuple[str, ...] = ()  # of all replicas that are ready
    warnings: tuple[str, ...] = ()  # replicas that are not there, and why
    lora: tuple[LoraMatch, ...] = ()
    degraded: str = ""  # why this is not the plan that was asked for; "" where it is


class Unloaded(Struct, frozen=True, kw_only=True, tag="unloaded", tag_field="type"):
    re: Id
    groups: tuple[str, ...]
    before: tuple[MemoryStatus, ...] = ()  # of the groups' devices
    after: tuple[MemoryStatus, ...] = ()


class Slept(Struct, frozen=True, kw_only=True, tag="slept", tag_field="type"):
    re: Id
    groups: tuple[str, ...]  # that sleep
    before: tuple[MemoryStatus, ...]
    after: tuple[MemoryStatus, ...]


class MemoryFreed(Struct, frozen=True, kw_only=True, tag="memory_freed", tag_field="type"):
    re: Id
    groups: tuple[str, ...]  # that were ended
    in_use: tuple[str, ...]  # that runs use, and that stayed
    before: tuple[MemoryStatus, ...]
    after: tuple[MemoryStatus, ...]


class RunOpened(Struct, frozen=True, kw_only=True, tag="run_opened", tag_field="type"):
    re: Id
    run: Id
    group: str
    plan: Plan
    model: ModelInfo
    lora: tuple[LoraMatch, ...] = ()
    degraded: str = ""  # why this is not the plan that was asked for; "" where it is


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
    degraded: str = ""  # why the run did not have the plan that was asked for; the latent is a true one


class Decoded(Struct, frozen=True, kw_only=True, tag="decoded", tag_field="type"):
    re: Id
    image: Tensor
    seconds: float
    degraded: str = ""  # why it was not done as asked; in tiles it is approximate


class Encoded(Struct, frozen=True, kw_only=True, tag="encoded", tag_field="type"):
    re: Id
    latent: Tensor
    seconds: float
    degraded: str = ""  # as in Decoded


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


class Farewell(Struct, frozen=True, kw_only=True, tag="farewell", tag_field="type"):
    re: Id


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
    estimate: float | None = None  # seconds until it is its turn, by what others took; None is unknown
    loaded: int = 0  # bytes of weights that are in place, of all ranks, while they load
    total: int = 0  # of how many; 0 where that is not known


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
    plan: Plan | None = None  # of that group
    degraded: str = ""  # why this is not the plan that was asked for; "" where it is


class RunEnded(Struct, frozen=True, kw_only=True, tag="run_ended", tag_field="type"):
    """The daemon ended a run that had nothing under way."""

    run: Id
    code: str
    message: str


Reply = Union[
    Welcome,
    StatusReport,
    ModelList,
    Explained,
    Loaded,
    Unloaded,
    Slept,
    MemoryFreed,
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
    Farewell,
    Failed,
    Queued,
    Progress,
    Rebound,
    Happened,
    RunEnded,
]
REPLIES = tags(Reply)
EVENTS = frozenset({"queued", "progress", "rebound", "happened", "run_ended"})
