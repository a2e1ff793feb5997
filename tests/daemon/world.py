"""A world for the daemon's core: it writes down what the core asks for and tells, and plays the ranks, their memory and the
clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec import Struct

from xditd.catalog.catalog import Found, FoundLora
from xditd.daemon.deadlines import Deadlines
from xditd.daemon.dispatcher import Dispatcher
from xditd.daemon.fallback import Ladder
from xditd.daemon.groups import Group, Restarts
from xditd.daemon.ports import HOST, Memory, Witness
from xditd.daemon.residency import Keep, Residency
from xditd.daemon.runs import Asked, Key, Run
from xditd.protocol import messages as m
from xditd.protocol import orders as o
from xditd.protocol.tensors import Tensor

DEADLINES = Deadlines(load=100.0, first_turn=50.0, turn=10.0, leave=5.0, run_idle=30.0)

REF = m.ModelRef(kind="diffusion_models", name="flux.safetensors")
VAE = m.ModelRef(kind="vae", name="ae.safetensors")

LATENT = Tensor(dtype="float32", shape=(1, 16, 8, 8), segment=1)


def info(name: str, family: str, parameters: int = 1) -> m.ModelInfo:
    return m.ModelInfo(
        kind="",
        name=name,
        part="",
        family=family,
        variant="",
        dtype="float32",
        bytes=1,
        parameters=parameters,
    )


class Notes(Witness):
    """What the core told, in its order: what happened, and to which run, model or group."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any]] = []

    def run_opened(self, run: Run) -> None:
        self.told.append(("run_opened", run.id))

    def run_ended(self, run: Run) -> None:
        self.told.append(("run_ended", run.id))

    def degraded(self, ref: m.ModelRef, why: str, run: Run | None) -> None:
        self.told.append(("degraded", ref.name if run is None else run.id))

    def turn_done(self, asked: Asked, seconds: float) -> None:
        self.told.append(("turn_done", asked.work.run))

    def group_changed(self, group: Group) -> None:
        self.told.append((group.state, group.name))


@dataclass
class World:
    """All ports of the core, and its hands."""

    devices: tuple[str, ...] = ("cpu:0", "cpu:1")
    restart_limit: int = 3
    restart_backoff: float = 0.0
    places: int = 32
    queue: int = 256
    memory_total: int | None = None  # bytes that models may take; None: not counted
    memory_others: int = 0  # of it, that other programs hold
    host_free: int | None = (
        None  # bytes of the machine's memory, of 100, for models that sleep; None: not counted
    )
    keep: Keep = field(default_factory=Keep)
    patience: float = 30.0
    weights: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)  # of models by name; of 4 bytes, in fp8 of 1
    lora_bytes: dict[str, int] = field(default_factory=dict)  # of LoRAs by name
    turn_seconds: float = 0.1  # that ranks say a turn took
    now: float = 1000.0
    answers: list[tuple[bytes, Struct]] = field(default_factory=list)
    orders: list[tuple[str, Struct]] = field(default_factory=list)
    started: list[Group] = field(default_factory=list)
    killed: list[Group] = field(default_factory=list)
    witness: Witness = field(default_factory=Notes)

    def __post_init__(self) -> None:
        restarts = Restarts(self.restart_limit, 300.0, self.restart_backoff)
        self.core = Dispatcher(
            self,
            self,
            self.witness,
            DEADLINES,
            restarts,
            Residency(self, self.keep, margin=0, patience=self.patience),
            queue=self.queue,
            places=self.places,
            weights=self.weights,
        )
        self._requests = 0

    # What the core asks for.

    def answer(self, peer: bytes, reply: Struct, frames: Sequence[Any] = ()) -> None:
        self.answers.append((peer, reply))

    def order(
        self, group: Group, order: Struct, *, peer: bytes | None = None, frames: Sequence[Any] = ()
    ) -> None:
        self.orders.append((group.name, order))

    def start(self, group: Group) -> None:
        self.started.append(group)

    def kill(self, group: Group) -> None:
        self.killed.append(group)

    def memory(self, pool: str) -> Memory | None:
        """What is free by the device: groups hold what they were counted with, from their start to their end."""
        if pool == HOST:
            return None if self.host_free is None else Memory(100, self.host_free)
        if self.memory_total is None:
            return None
        groups = self.core.fleet.groups.values()
        # One that wakes takes its memory no sooner than it says that it is awake.
        there = [group for group in groups if group.state != "waking"]
        held = self.core.fleet.residency.resident(there, pool)
        return Memory(self.memory_total, self.memory_total - self.memory_others - held)

    def total_and_used(self, device: str) -> tuple[int | None, int | None]:
        told = self.memory(device)
        return (None, None) if told is None else (told.total, told.total - told.free)

    # What happens in the world.

    def request(self) -> int:
        self._requests += 1
        return self._requests

    def open(
        self,
        peer: bytes = b"comfy",
        ref: m.ModelRef = REF,
        devices: tuple[str, ...] = (),
        replicas: int = 1,
        scheduling: str = "round_robin",
        loras: Sequence[tuple[str, float]] = (),
        weight_dtype: str = "",
        ladder: Ladder | None = None,
        **arguments: Any,
    ) -> Run:
        """A run of a model on the devices, or on equal shares of them."""
        found_loras = [
            FoundLora(
                f"/{name}",
                (),
                m.LoraMatch(name=name, strength=strength, matched=1, modules=1),
                bytes=self.lora_bytes.get(name, 0),
                adding=0,
            )
            for name, strength in loras
        ]
        found, keys = self.what(ref, devices, replicas, weight_dtype)
        plan = m.PlanRequest(scheduling=scheduling)
        request = m.OpenRun(id=self.request(), model=ref, plan=plan, **arguments)
        return self.core.open(peer, "test", request, found, keys, self.now, found_loras, ladder)

    def load(self, ref: m.ModelRef = REF, devices: tuple[str, ...] = (), replicas: int = 1) -> int:
        request = m.Load(id=self.request(), model=ref)
        self.core.fleet.load(b"ctl", request, *self.what(ref, devices, replicas), self.now)
        return request.id

    def what(
        self, ref: m.ModelRef, devices: tuple[str, ...] = (), replicas: int = 1, weight_dtype: str = ""
    ) -> tuple[Found, tuple[Key, ...]]:
        devices = devices or self.devices
        size = len(devices) // replicas
        found = Found(
            path=f"/{ref.name}", info=info(ref.name, "echo", self.parameters.get(ref.name, 1)), prefix=""
        )
        shares = [devices[first : first + size] for first in range(0, size * replicas, size)]
        return found, tuple(
            Key(found.path, "", "float32", m.Plan(devices=share, ulysses=size, weight_dtype=weight_dtype))
            for share in shares
        )

    def open_ready(self, **arguments: Any) -> Run:
        run = self.open(**arguments)
        if run.state == "queued":
            self.ready(self.started[-1])
        return run

    def ready(self, group: Group) -> None:
        for rank in group.ranks:
            report = o.RankReady(rank=rank.rank, seconds=1.0, device_memory=None, attention="")
            self.core.fleet.rank_ready(group, report, self.now)

    def rest(self, group: Group, *, asleep: bool) -> None:
        """Its ranks have done what they were told: they sleep, or are awake."""
        for rank in group.ranks:
            report = o.RankRested(rank=rank.rank, asleep=asleep, seconds=0.1, device_memory=None)
            self.core.fleet.rank_rested(group, report, self.now)

    def denoise(self, run: Run) -> int:
        item = m.DenoiseItem(x=LATENT, t=(1.0,), conditioning="c")
        work = m.Denoise(id=self.request(), run=run.id, items=(item,))
        self.core.ask(run, work, (), self.now)
        return work.id

    def sample(self, run: Run, steps: int = 3) -> int:
        sigmas = (*(1 - i / steps for i in range(steps)), 0.0)
        work = m.Sample(
            id=self.request(), run=run.id, sampler="euler", sigmas=sigmas, noise=LATENT, conditioning="c"
        )
        self.core.ask(run, work, (), self.now)
        return work.id

    def finish_turn(self, group: Group) -> None:
        """Rank 0 reports the turn that the group is in."""
        assert group.turn is not None
        done = o.TurnDone(order=group.turn, outputs=(LATENT,), seconds=self.turn_seconds)
        self.core.turn_done(group, done, (), self.now)

    def die(self, group: Group, rank: int = 0) -> None:
        """One rank is killed from outside; the others follow, since the core kills them."""
        self.core.fleet.rank_gone(group, rank, "was killed by SIGKILL", self.now)
        for other in group.ranks:
            if not other.gone:
                self.core.fleet.rank_gone(group, other.rank, "was killed by SIGKILL", self.now)

    def leave(self, group: Group) -> None:
        for rank in group.ranks:
            self.core.fleet.rank_gone(group, rank.rank, "exited with code 0", self.now)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.core.tick(self.now)

    # What is known of it.

    @property
    def told(self) -> list[tuple[str, Any]]:
        assert isinstance(self.witness, Notes)
        return self.witness.told

    @property
    def ended(self) -> list[int]:
        """Runs that have ended, in order."""
        return [about for event, about in self.told if event == "run_ended"]

    def group(self, run: Run) -> Group:
        return self.core.fleet.groups[run.group]

    def turns(self) -> list[int]:
        """The runs that got turns, in order."""
        kinds = (o.TurnDenoise, o.TurnSample, o.TurnDecode, o.TurnEncode)
        return [order.run for _, order in self.orders if isinstance(order, kinds)]

    def of(self, request: int) -> list[Struct]:
        """Every reply and event that names the request."""
        return [reply for _, reply in self.answers if getattr(reply, "re", None) == request]

    def end_of(self, request: int) -> Struct:
        """The one answer to a request: never none, never two."""
        final = [r for r in self.of(request) if r.__struct_config__.tag not in m.EVENTS]
        assert len(final) == 1, final
        return final[0]
