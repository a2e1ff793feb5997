"""What the daemon is told at its start: a TOML file, validated once into frozen structs.

Knows no socket, device or environment variable, and opens no file but the one it is given. Every key is
documented in systemd/xditd.toml.example and docs/configuration.md; a test holds the three together.
"""

from __future__ import annotations

import ipaddress
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, field

from xditd.daemon.config_file import merge, nest, read_toml, resolve, sentence
from xditd.protocol import endpoints
from xditd.protocol.errors import Code, XditError
from xditd.protocol.plans import Degree, ModelRef, PlanRequest

Size = Annotated[int, Meta(ge=0, le=1 << 50, extra={"unit": "bytes"})]
"""Bytes; a file may also say "256MiB"."""

Seconds = Annotated[float, Meta(gt=0, le=7 * 86400, extra={"unit": "seconds"})]
"""Seconds; a file may also say "90s", "5min" or "2h"."""

Keeping = Annotated[float, Meta(ge=0, extra={"unit": "keep"})]
"""Seconds that a model stays unused; a file may also say "10min", "forever" or "never"."""

Awake = Annotated[float, Meta(ge=0, extra={"unit": "sleep"})]
"""Seconds after which a model goes to sleep; a file may also say "10min" or "never"."""

Weight = Annotated[float, Meta(gt=0, le=1e6)]

FilePath = Annotated[str, Meta(max_length=4096, extra={"unit": "path"})]
"""A path; "~" is expanded and a relative one begins at the configuration file's folder."""

Count = Annotated[int, Meta(ge=1, le=65536)]

Dtype = Literal["", "bfloat16", "float16", "float32"]


class Devices(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which devices the daemon owns."""

    kind: Literal["auto", "cuda", "cpu"] = "auto"  # auto: cuda where NVML sees a GPU, else cpu
    use: tuple[str, ...] = ()  # GPUs by index in PCI order or by UUID; () is all of them
    cpu_ranks: Annotated[int, Meta(ge=1, le=64)] = 2  # devices "cpu:0"… of a daemon without GPUs
    threads: Annotated[int, Meta(ge=0, le=1024)] = 0  # of a CPU rank; 0 shares the cores out evenly
    reserve_memory: Size = 0  # of each GPU, left to other programs (a ComfyUI on the same GPU)
    activation_memory: Size = 512 << 20  # of each rank, counted beside its weights
    cpu_memory: Size = 0  # that models on CPU ranks may take, together; 0: not counted
    weights: dict[str, Weight] = field(default_factory=dict)  # by device: shares of weighted_round_robin

    def threads_per_rank(self, cores: int) -> int:
        """Threads of one CPU rank on a machine with that many cores: at least 1."""
        return self.threads or max(1, cores // self.cpu_ranks)


class Preload(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A model to have ready after a start, and the plan to have it under."""

    # "kind/name": "diffusion_models/flux1-dev.safetensors"
    model: Annotated[str, Meta(pattern=r"^[a-z_]+/.+")]
    part: Literal["", "transformer", "vae", "clip_l", "clip_g", "t5xxl", "hydit_clip", "mt5xl"] = (
        ""  # of a checkpoint
    )
    dtype: Dtype = ""  # "" is compute.dtype
    devices: tuple[str, ...] = ()  # () is all that the daemon owns
    strategy: str = "auto"
    cfg: Degree = 0  # degrees: 0 leaves the planner the choice
    ulysses: Degree = 0
    ring: Degree = 0
    pipefusion: Degree = 0
    tensor: Degree = 0
    patch: Degree = 0
    offload: Literal["", "model", "layerwise"] = (
        ""  # where the weights are outside of turns; "" on the devices
    )
    shard: bool = False  # ranks of ulysses and ring hold a share of the weights each
    weight_dtype: Literal["", "file", "float8_e4m3fn", "float8_e5m2"] = (
        ""  # in what a transformer keeps its weights; "" in what it computes with
    )
    replicas: Degree = 0  # groups that share the devices; 0 is one

    @property
    def ref(self) -> ModelRef:
        kind, _, name = self.model.partition("/")
        return ModelRef(kind=kind, name=name, part=self.part, dtype=self.dtype)

    @property
    def plan(self) -> PlanRequest:
        """What it has keys for; the rest is as a client leaves it out."""
        asked = PlanRequest.__struct_fields__
        return PlanRequest(**{name: getattr(self, name) for name in self.__struct_fields__ if name in asked})


class Models(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where models lie, and which are loaded at the start."""

    comfyui: FilePath = ""  # a ComfyUI folder: its models/ and its extra_model_paths.yaml are read
    extra_model_paths: FilePath = ""  # a further file in ComfyUI's extra_model_paths.yaml format
    folders: dict[str, tuple[FilePath, ...]] = field(default_factory=dict)  # kind to folders, searched first
    follow_symlinks: bool = False  # links below a folder may lead out of it
    preload: tuple[Preload, ...] = ()
    keep_alive: Keeping = math.inf  # how long a model stays that no run uses, unless its room is needed
    keep_alive_of: dict[str, Keeping] = field(default_factory=dict)  # the same by "kind/name"
    sleep_after: Awake = (
        math.inf
    )  # how long one stays on its devices that no run uses, before it sleeps in host memory
    sleep_after_of: dict[str, Awake] = field(default_factory=dict)  # the same by "kind/name"
    patience: Seconds = 30.0  # a model that waits for room, until those in use make it


class Arena(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Shared memory for clients' tensors."""

    first_bytes: Size = 16 << 20  # of a client's first segment; a larger need adds segments
    per_client_bytes: Size = 1 << 30
    total_bytes: Size = 4 << 30  # of all clients; host memory that nothing can reclaim

    def __post_init__(self) -> None:
        if not 4096 <= self.first_bytes <= self.per_client_bytes <= self.total_bytes:
            raise ValueError(
                "needs 4096 <= first_bytes <= per_client_bytes <= total_bytes, "
                f"but they are {self.first_bytes}, {self.per_client_bytes} and {self.total_bytes}"
            )


class Limits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the daemon accepts before it refuses more."""

    runs_per_client: Count = 16  # open at once
    queue: Count = 256  # runs waiting, of all clients
    runs_per_group: Count = 32  # that take turns on one group; further ones wait
    clients: Count = 256  # connected at once


class Deadlines(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long each phase may last, in seconds. Past it the thing waited for is ended, with a code."""

    load: Seconds = 900.0  # a group, from its start to ready
    first_turn: Seconds = 900.0  # a group's first turn: it may compile
    turn: Seconds = 300.0  # any later turn
    run_idle: Seconds = 120.0  # a run whose client asks for nothing
    queued: Seconds = 3600.0  # a run that waits for its first place on a group
    stop: Seconds = 5.0  # ranks, from being told to leave to being killed
    drain: Seconds = 30.0  # runs under way when the daemon is told to stop


class Restart(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a group that keeps failing is given up."""

    limit: Annotated[int, Meta(ge=1, le=1000)] = 3  # failures within the window; 1 never tries again
    window: Seconds = 300.0
    backoff: Seconds = 1.0  # before the second new try, the first is at once; doubled for each further one


class Compute(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How ranks compute, where a request does not say."""

    compile: bool = False  # torch.compile of a transformer's layers, each by itself
    dtype: Dtype = ""  # "" is the file's own on a GPU, float32 on a CPU
    # a plan that cannot be had: fewer devices do it, and everybody is told ("auto"), or it fails
    fallback: Literal["auto", "never"] = "auto"
    # of transformers on GPUs; "" is the best that is installed for the GPU and the dtype
    attention: Literal["", "flash_4", "flash_3", "cudnn", "flash", "efficient"] = ""


class Log(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class Metrics(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where Prometheus may scrape."""

    port: Annotated[int, Meta(ge=0, le=65535)] = 0  # 0: nowhere
    address: str = "127.0.0.1"  # to listen on

    def __post_init__(self) -> None:
        try:
            ipaddress.ip_address(self.address)
        except ValueError:
            raise ValueError(f'address {self.address!r} is no IP address: write "127.0.0.1"') from None


class Debug(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """For tests and benchmarks."""

    echo: bool = False  # serve the family "echo": ranks that do no work
    rank_options: dict[str, str] = field(default_factory=dict)  # handed to every rank: fault injection
    rank_command: tuple[str, ...] = ()  # starts a rank of a test's own; () is python -m xditd.rank
    # a nursery that is there already: the descriptor of its socket, and the pid of this child
    nursery: tuple[int, ...] = ()


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole configuration."""

    endpoint: str = ""  # "ipc:///path" or "tcp://address:port"; "" is the user's or the system's own socket
    runtime_dir: FilePath = ""  # sockets, lock and rendezvous files; "" is beside the endpoint
    allow_insecure_tcp: bool = False  # a tcp endpoint has neither encryption nor authentication yet
    nursery: bool = True  # a process that has imported what ranks import, and forks them: they start in less than a second
    devices: Devices = field(default_factory=Devices)
    models: Models = field(default_factory=Models)
    arena: Arena = field(default_factory=Arena)
    limits: Limits = field(default_factory=Limits)
    deadlines: Deadlines = field(default_factory=Deadlines)
    restart: Restart = field(default_factory=Restart)
    compute: Compute = field(default_factory=Compute)
    log: Log = field(default_factory=Log)
    metrics: Metrics = field(default_factory=Metrics)
    debug: Debug = field(default_factory=Debug)

    def __post_init__(self) -> None:
        if not self.endpoint:
            return
        try:
            endpoints.parse(self.endpoint, "the configured one")
        except XditError as error:
            raise ValueError(f"endpoint: {error.message.rstrip('.')}") from error
        check_endpoint(self.endpoint, allow_tcp=self.allow_insecure_tcp)


def check_endpoint(address: str, *, allow_tcp: bool) -> None:
    """Refuses an endpoint that strangers could reach, whoever named it: the configuration or the environment.

    Raises:
        ValueError: with one sentence.
    """
    if address.startswith("tcp://") and not allow_tcp:
        raise ValueError(
            f"endpoint {address!r} would let everybody who can reach it use this machine: tcp has no "
            "encryption or authentication yet. Use ipc:///path, or set allow_insecure_tcp = true on a "
            "network that you trust"
        )


def load_config(path: str | os.PathLike[str] | None, overrides: Mapping[str, Any] | None = None) -> Config:
    """The configuration of a file, or the defaults.

    Args:
        path: the TOML file; None is no file.
        overrides: values by dotted key ("devices.cpu_ranks"), from a command line; they win over the file.

    Raises:
        XditError: `bad_config`, with one sentence that names the file and the key.
    """
    plain: dict[str, Any] = {}
    where = "the command line"
    if path is not None:
        where = str(path)
        plain = resolve(read_toml(Path(path)), Config, where, Path(path).absolute().parent)
    if overrides:
        merge(plain, resolve(nest(overrides), Config, "the command line", Path.cwd()))
    try:
        return msgspec.convert(plain, Config)
    except msgspec.ValidationError as error:
        raise XditError(Code.BAD_CONFIG, f"{where}: {sentence(str(error))}.") from error
