"""The messages between the daemon and its ranks. Private to one installation: both ends are the same version.

The daemon sends every order to every rank of a group in the same order; so ranks agree without asking each
other: a cancelled run simply gets no further turn. An order that makes ranks meet in collectives is a *turn*;
a group has at most one turn under way. Only rank 0 reads a client's bytes, broadcasts them, and answers.
"""

from __future__ import annotations

import struct
from typing import Union

from msgspec import Struct, field

from xditd.protocol.codec import tags
from xditd.protocol.messages import DenoiseItem, Plan
from xditd.protocol.tensors import Tensor


class RankSpec(Struct, frozen=True, kw_only=True):
    """All that a rank process is told at its start (JSON, on its standard input)."""

    group: str
    generation: int
    rank: int
    world: int
    device: str  # "cpu:1", "cuda:0"
    plan: Plan
    endpoint: str  # of the daemon's rank socket
    store: str  # a file for torch.distributed's rendezvous, "file:///..."
    parent: int  # pid of the daemon: gone means exit
    path: str  # of the model file
    part: str  # "transformer", "vae", "text_encoder", or one of a checkpoint's text encoders: "clip_l"
    family: str  # a folder of xditd.models, or "echo": a rank that does no work, for benchmarks
    variant: str
    dtype: str  # compute dtype
    arena_fd: int = -1  # rank 0: the socket that segments' descriptors come by
    lane_fd: int = -1  # a shortcut for orders without frames (`handoff.lane`); without it they come by ZeroMQ
    threads: int = 0  # of a CPU rank; 0 leaves torch's choice
    compile: bool = False  # torch.compile of layers, each by itself
    attention: str = ""  # a transformer's kernel (`protocol.kernels`); "" is the best that there is
    options: dict[str, str] = field(default_factory=dict)  # of tests and benchmarks


# ---------------------------------------------------------------------------------------------------- orders


class Merge(Struct, frozen=True, kw_only=True):
    """A LoRA that is merged into a model's weights."""

    path: str  # of its file
    strength: float
    stamp: tuple[
        int, ...
    ] = ()  # of the file, as it was when the run was opened: another content is another LoRA


class SetLoras(Struct, frozen=True, kw_only=True, tag="set_loras", tag_field="type"):
    """The run's turns are done with exactly these merged; kept until `forget_run`. No collective: each rank reads the files."""

    run: int
    loras: tuple[Merge, ...]


class SetConditioning(Struct, frozen=True, kw_only=True, tag="set_conditioning", tag_field="type"):
    """Rank 0 reads, all receive; kept until `forget_run`. A collective, but not a turn."""

    run: int
    key: str
    tensors: dict[str, Tensor]
    values: dict[str, float]


class TurnDenoise(Struct, frozen=True, kw_only=True, tag="turn_denoise", tag_field="type"):
    order: int
    run: int
    items: tuple[DenoiseItem, ...]
    singly: bool = False  # a batch is computed one item after another


class BeginSample(Struct, frozen=True, kw_only=True, tag="begin_sample", tag_field="type"):
    """Rank 0 reads noise and latent, all receive; the loop's state is kept until its last step or `forget_run`."""

    run: int
    sampler: str
    sigmas: tuple[float, ...]
    noise: Tensor
    latent: Tensor | None
    conditioning: str
    negative: str | None
    cfg: float
    out: Tensor | None
    previews: tuple[Tensor, ...]
    preview_frames: bool
    warmup: int = 1
    patches: int = 0
    singly: bool = False  # a batch is computed one item after another


class TurnSample(Struct, frozen=True, kw_only=True, tag="turn_sample", tag_field="type"):
    """One step of a begun sample: from sigmas[step] to sigmas[step + 1]."""

    order: int
    run: int
    step: int


class TurnDecode(Struct, frozen=True, kw_only=True, tag="turn_decode", tag_field="type"):
    order: int
    run: int
    latent: Tensor
    clamp: bool
    out: Tensor | None
    singly: bool = False  # a batch is computed one item after another
    tile: int = 0  # side of the tiles in pixels; 0 is whole
    tiles: bool = False  # in tiles, where memory runs out


class TurnEncode(Struct, frozen=True, kw_only=True, tag="turn_encode", tag_field="type"):
    order: int
    run: int
    image: Tensor
    out: Tensor | None
    singly: bool = False  # a batch is computed one item after another
    tile: int = 0
    tiles: bool = False


class TurnEncodeText(Struct, frozen=True, kw_only=True, tag="turn_encode_text", tag_field="type"):
    order: int
    run: int
    tokens: Tensor
    vectors: Tensor | None
    mask: Tensor | None
    layer: int | None
    final_norm: bool
    pooled: str
    out: Tensor | None
    pooled_out: Tensor | None


class ForgetRun(Struct, frozen=True, kw_only=True, tag="forget_run", tag_field="type"):
    run: int


class DropSegments(Struct, frozen=True, kw_only=True, tag="drop_segments", tag_field="type"):
    """A client is gone: rank 0 unmaps its segments."""

    segments: tuple[int, ...]


class Sleep(Struct, frozen=True, kw_only=True, tag="sleep", tag_field="type"):
    """Give the device's memory back and keep the weights; no run is on the group. Answered by `rank_rested`."""


class Wake(Struct, frozen=True, kw_only=True, tag="wake", tag_field="type"):
    """Take the weights back to the device. Answered by `rank_rested`."""


class Leave(Struct, frozen=True, kw_only=True, tag="leave", tag_field="type"):
    """End the process, exit code 0."""


Order = Union[
    SetLoras,
    SetConditioning,
    TurnDenoise,
    BeginSample,
    TurnSample,
    TurnDecode,
    TurnEncode,
    TurnEncodeText,
    ForgetRun,
    DropSegments,
    Sleep,
    Wake,
    Leave,
]
ORDERS = tags(Order)

TURNS = (TurnDenoise, TurnSample, TurnDecode, TurnEncode, TurnEncodeText)

RESTS = (Sleep, Wake)

AFTER = struct.Struct("<Q")
"""Before an order on a lane: how many orders come before it by ZeroMQ, counted from the rank's start."""


# --------------------------------------------------------------------------------------------------- reports


class RankPhase(Struct, frozen=True, kw_only=True, tag="rank_phase", tag_field="type"):
    """Where a starting rank is: "importing", "joining", "loading". Its first one introduces it."""

    group: str
    generation: int
    rank: int
    pid: int
    phase: str
    loaded: int = 0  # bytes of its weights that are in place, while it loads
    total: int = 0  # of how many


class RankReady(Struct, frozen=True, kw_only=True, tag="rank_ready", tag_field="type"):
    rank: int
    seconds: float
    device_memory: int | None
    attention: str
    weights: int = 0  # bytes of the model's parameters that this rank holds on its device, in a turn
    host_weights: int = 0  # bytes of them that wait in the host's memory


class RankRested(Struct, frozen=True, kw_only=True, tag="rank_rested", tag_field="type"):
    """The rank sleeps, or is awake again."""

    rank: int
    asleep: bool
    seconds: float  # that it took
    device_memory: int | None


class TurnDone(Struct, frozen=True, kw_only=True, tag="turn_done", tag_field="type"):
    """From rank 0 alone. Frames follow for outputs that have no slot.

    `outputs` of a sample's turn: the latent on its last step, nothing before; `preview` where one was written.
    """

    order: int
    outputs: tuple[Tensor, ...]
    seconds: float
    preview: Tensor | None = None
    device_memory: int | None = None
    degraded: str = ""  # why the turn was not done as ordered


class RankFailed(Struct, frozen=True, kw_only=True, tag="rank_failed", tag_field="type"):
    """An exception. `order` is the turn it ended, None outside of turns; there `run` is whose order it was, if it was a
    run's. With `alive` the rank serves on."""

    rank: int
    order: int | None
    run: int | None = None
    code: str
    message: str
    traceback: str  # for the log only
    alive: bool


Report = Union[RankPhase, RankReady, RankRested, TurnDone, RankFailed]
REPORTS = tags(Report)
