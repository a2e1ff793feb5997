"""Which models stay in memory: whether one more has room, who makes room for it, who has stayed long enough. Pure.

A group is counted with an estimate (weights, a margin for activations, LoRAs beside weights in fp8) until its last rank is gone; what devices
say themselves counts too, so that other programs are seen. All CPU ranks share one memory, the machine's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from xditd.catalog.catalog import Found
from xditd.catalog.families.layers import layers
from xditd.daemon import states
from xditd.daemon.groups import Group
from xditd.daemon.ports import HOST, Memory, MemoryPort
from xditd.daemon.runs import Key
from xditd.protocol.plans import LAYERS_AT_ONCE, ModelInfo, Plan
from xditd.protocol.tensors import ITEMSIZE

SETTLE = 5.0
"""Seconds after which memory that nobody of ours holds is taken to be another program's."""

HOLDING = frozenset({"starting", "ready", "dozing", "waking", "leaving", "failed"})
"""States of a group whose processes may hold memory of a device, unless it fell asleep before: then it gave that back."""

IDLING = frozenset({"starting", "ready", "waking"})
"""Those in which it can be ended for another, where no run uses it."""

LEFT_TO_OTHERS = 0.1
"""Share of the machine's memory that sleeping models leave free, whatever else they would take."""


@dataclass(frozen=True, slots=True)
class Keep:
    """How long a model stays that no run uses, in seconds; `math.inf` is for ever."""

    usual: float = math.inf
    of: Mapping[str, float] = field(default_factory=dict)  # by "kind/name"
    awake: float = math.inf  # how long on its devices, before it goes to sleep; `math.inf`: it never does
    awake_of: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, group: Group) -> float:
        return self.of.get(f"{group.ref.kind}/{group.ref.name}", self.usual)

    def seconds_awake(self, group: Group) -> float:
        return self.awake_of.get(f"{group.ref.kind}/{group.ref.name}", self.awake)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to happen to a group that waits for room.

    Attributes:
        fits: it may start.
        evict: groups to end for it, which no run uses.
        sleep: groups to put to sleep for it, which no run uses.
        hold: groups that runs use and that it needs gone: none of them takes another run, if it has waited for long.
        never: why it can not have room, as a sentence; "" where it may.
    """

    fits: bool = False
    evict: tuple[Group, ...] = ()
    sleep: tuple[Group, ...] = ()
    hold: tuple[Group, ...] = ()
    never: str = ""
    where: str = ""  # the device on which it can not


class Residency:
    """The rules of memory.

    Args:
        memory: what devices say.
        keep: how long who stays.
        margin: bytes of activations, of each rank.
        patience: seconds after which a model that waits for room gets it from models that are in use.
    """

    def __init__(
        self, memory: MemoryPort, keep: Keep | None = None, margin: int = 0, patience: float = 30.0
    ) -> None:
        self.memory = memory
        self.keep = keep or Keep()
        self.margin = margin
        self.patience = patience

    def needs(self, found: Found, key: Key, loras: int = 0) -> dict[str, int]:
        """Bytes that a group takes in a turn, by the pool of memory: of each rank its weights, a margin for activations, and
        LoRAs, which lie beside weights in fp8 and are merged into any other."""
        needs: dict[str, int] = {}
        beside = loras if key.plan.weight_dtype else 0
        for device in key.plan.devices:
            needs.setdefault(pool(device), 0)
            needs[pool(device)] += weights(found.info, key.dtype, key.plan) + self.margin + beside
        return needs

    def passing(self, group: Group, where: str) -> int:
        """Bytes of a pool that a group takes in its turns alone. No two groups have a turn on one device at once."""
        if group.key.plan.offload != "model":
            return 0
        ranks = sum(pool(device) == where for device in group.devices)
        return ranks * weights(group.found.info, group.key.dtype, group.key.plan)

    def resident(self, groups: Iterable[Group], device: str) -> int:
        """Bytes that the groups are counted with on a device's memory."""
        return sum(self._of(group, pool(device)) for group in groups if _holds(group))

    def too_large(self, found: Found, key: Key, loras: int = 0) -> str:
        """Why the model can never have room, whoever else leaves; "" where it can.

        Args:
            loras: bytes of those that a run asks for.
        """
        besides = " with its LoRAs" if loras and key.plan.weight_dtype else ""
        for where, needed in self.needs(found, key, loras).items():
            memory = self.memory.memory(where)
            if memory is not None and needed > memory.total:
                return (
                    f"{found.info.name}{besides} needs {_gib(needed)} on {where}, but the daemon may use {_gib(memory.total)} "
                    f"of it; spread it over more devices or raise the limit"
                )
        return ""

    def decide(
        self,
        group: Group,
        groups: Sequence[Group],
        in_use: Callable[[Group], bool],
        now: float,
        loras: int = 0,
    ) -> Verdict:
        """Whether a group has room that waits, that is to wake, or that serves and lacks room for LoRAs alone; and who is to make
        some.

        Args:
            loras: bytes of those that the run has which it takes next.
        """
        if loras and (problem := self.too_large(group.found, group.key, loras)):
            return Verdict(never=problem)
        since = group.started if group.asked is None else group.asked
        serves = _holds(group)
        there_already = self.needs(group.found, group.key, group.lora_bytes) if serves else {}
        who = f"What LoRAs add to {group.found.info.name}" if serves else group.found.info.name
        evict: list[Group] = []
        hold: list[Group] = []
        coming = False  # memory that is on its way back
        for where, all_needed in self.needs(group.found, group.key, loras).items():
            memory = self.memory.memory(where)
            if memory is None:
                continue
            needed = all_needed - there_already.get(where, 0)
            there = [one for one in groups if _holds(one) and where in self.needs(one.found, one.key)]
            others = [one for one in there if one is not group]
            own = 0 if serves else self.passing(group, where)
            lacking: float = (
                needed - own + self._passing(there, where, own) - self._room(memory, there, where)
            )
            if lacking <= 0:
                continue
            leaving = [one for one in others if one.state in ("leaving", "failed", "dozing")]
            coming = coming or bool(leaving)
            lacking -= sum(self._back(one, where) for one in (*leaving, *evict))
            idle = [g for g in others if not in_use(g)]
            lacking = self._take(lacking, idle, where, evict, now)
            lacking = self._take_passing(lacking, idle, there, where, own, evict)
            busy = [g for g in others if in_use(g) and g.state in IDLING]
            if lacking > 0 and not busy and not evict and not leaving and now - since > SETTLE:
                return Verdict(
                    never=f"{who} needs {_gib(needed)} on {where}, {_gib(lacking)} more than is "
                    f"free; another program holds the rest",
                    where=where,
                )
            lacking = self._take(lacking, busy, where, hold, now)
            lacking = self._take_passing(lacking, busy, there, where, own, hold)
            coming = coming or lacking > 0
        host = self._host(group, groups, in_use, now)
        if host.never:
            return host
        evict.extend(host.evict)
        held = tuple(hold) if now - since > self.patience else ()
        fits = host.fits and not evict and not hold and not coming
        sleep: list[Group] = []
        for one in evict:
            if self.may_sleep(one, groups, sleep):
                sleep.append(one)
        ended = tuple(one for one in evict if one not in sleep)
        return Verdict(fits=fits, evict=ended, sleep=tuple(sleep), hold=held)

    def expired(self, groups: Iterable[Group], in_use: Callable[[Group], bool], now: float) -> list[Group]:
        """Groups that no run has used for as long as they are to be kept."""
        kept = states.GROUP_LOADED
        return [
            g for g in groups if g.state in kept and now - g.used >= self.keep.seconds(g) and not in_use(g)
        ]

    def sleepy(self, groups: Sequence[Group], in_use: Callable[[Group], bool], now: float) -> Group | None:
        """A group that no run has used for as long as it is to be awake, and for which there is room to sleep in."""
        idle = (g for g in groups if now - g.used >= self.keep.seconds_awake(g) and not in_use(g))
        return next((g for g in idle if self.may_sleep(g, groups)), None)

    def may_sleep(self, group: Group, groups: Iterable[Group], besides: Sequence[Group] = ()) -> bool:
        """Whether it is one that sleeps by itself, and the host's memory has room for its weights.

        Args:
            besides: that are about to be told to sleep too.
        """
        if group.state != "ready" or math.isinf(self.keep.seconds_awake(group)):
            return False
        return self.room_to_sleep(group, groups, besides)

    def room_to_sleep(self, group: Group, groups: Iterable[Group], besides: Sequence[Group] = ()) -> bool:
        """Whether the host's memory has room for its weights."""
        host = self.memory.memory(HOST)
        if host is None:
            return True
        taken = sum(map(self.host_bytes, (group, *besides))) + sum(map(_coming_to_host, groups))
        return host.free - taken >= LEFT_TO_OTHERS * host.total

    def host_bytes(self, group: Group) -> int:
        """Bytes of the host's memory that a group takes when it sleeps."""
        return 0 if group.key.plan.offload else _of_host(group)  # what waits there does so anyway

    def to_free(
        self,
        nbytes: int,
        devices: Iterable[str],
        groups: Iterable[Group],
        in_use: Callable[[Group], bool],
        now: float,
    ) -> list[Group]:
        """Groups to end so that each device gets so many bytes back, or all that can be where `nbytes` is 0."""
        groups = list(groups)
        idle = [group for group in groups if group.state in IDLING and not in_use(group)]
        pools = dict.fromkeys(pool(device) for device in devices)
        chosen: list[Group] = []
        if not nbytes:  # all is all: what sleeps has the host's memory, and something of the device's
            chosen += [
                g
                for g in groups
                if g.state in ("dozing", "asleep")
                and not in_use(g)
                and any(pool(device) in pools for device in g.devices)
            ]
        for where in pools:
            wanted: float = nbytes or math.inf
            self._take(wanted - sum(self._back(one, where) for one in chosen), idle, where, chosen, now)
        return chosen

    # -------------------------------------------------------------------------------------------- inside

    def _of(self, group: Group, where: str) -> int:
        """Bytes that it is counted with, whether it has a turn or not."""
        needs = self.needs(group.found, group.key, group.lora_bytes)
        return needs.get(where, 0) - self.passing(group, where)

    def _passing(self, groups: Iterable[Group], where: str, own: int) -> int:
        """The most that one of these takes in a turn alone, or one that takes `own`."""
        return max((own, *(self.passing(one, where) for one in groups)))

    def _take_passing(
        self,
        lacking: float,
        groups: Sequence[Group],
        there: Sequence[Group],
        where: str,
        own: int,
        into: list[Group],
    ) -> float:
        """Adds groups that take more in a turn than others, until nothing is lacking. Returns what still is."""
        for group in sorted(groups, key=lambda one: -self.passing(one, where)):
            if lacking <= 0 or self.passing(group, where) <= own:
                break
            if group.state in IDLING and group not in into:
                before = self._passing((one for one in there if one not in into), where, own)
                into.append(group)
                lacking -= before - self._passing((one for one in there if one not in into), where, own)
        return lacking

    def _host(
        self, group: Group, groups: Sequence[Group], in_use: Callable[[Group], bool], now: float
    ) -> Verdict:
        """Whether the host's memory has room for the weights of a group that starts and offloads them; models that sleep there make
        some."""
        host = self.memory.memory(HOST)
        needed = _of_host(group)
        if host is None or group.state != "waiting" or not group.key.plan.offload or not needed:
            return Verdict(fits=True)
        lacking = needed - (host.free - LEFT_TO_OTHERS * host.total)
        if lacking <= 0:  # of the free, others may be about to take theirs
            return Verdict(fits=lacking + sum(map(_coming_to_host, groups)) <= 0)
        leaving = [one for one in groups if one.state in ("leaving", "failed")]
        lacking -= sum(map(_of_host, leaving))
        evict: list[Group] = []
        asleep = (one for one in groups if one.state == "asleep" and _of_host(one) and not in_use(one))
        for one in sorted(asleep, key=lambda one: -worthless(one, now)):
            if lacking > 0:
                evict.append(one)
                lacking -= _of_host(one)
        if lacking <= 0:
            return Verdict(evict=tuple(evict))
        return Verdict(
            never=f"{group.found.info.name} needs {_gib(needed)} of the host's memory to be offloaded to, which are not free"
        )

    def _back(self, group: Group, where: str) -> int:
        """Bytes that come back when it is gone: what its ranks say, where that is more."""
        told = sum(r.device_memory or 0 for r in group.ranks if pool(r.device) == where)
        return max(self._of(group, where), told)

    def _room(self, memory: Memory, there: Sequence[Group], where: str) -> int:
        """By estimate and by what the device says; a group that starts or wakes has not taken all that it will."""
        counted = memory.total - sum(self._of(one, where) for one in there)
        starting = sum(self._of(one, where) for one in there if one.state in ("starting", "waking"))
        passing = sum(self.passing(one, where) for one in there if one.turn is not None)
        return min(counted, memory.free - starting + passing)

    def _take(
        self, lacking: float, groups: Sequence[Group], where: str, into: list[Group], now: float
    ) -> float:
        """Adds the groups that are worth least until nothing is lacking. Returns what still is."""
        taken: list[Group] = []
        for group in sorted(groups, key=lambda one: -worthless(one, now)):
            if lacking <= 0:
                break
            if group.state in IDLING and group not in into and self._of(group, where):
                taken.append(group)
                lacking -= self._back(group, where)
        for group in list(taken):  # a small one that a large one made unnecessary stays
            if lacking + self._back(group, where) <= 0:
                taken.remove(group)
                lacking += self._back(group, where)
        into.extend(taken)
        return lacking


def worthless(group: Group, now: float) -> float:
    """How little a group is worth: long idle, and quickly loaded again."""
    return (now - group.used) / max(group.ready_after or 0.0, 0.1)


def weights(info: ModelInfo, dtype: str, plan: Plan) -> int:
    """Bytes of the weights of one rank that are on its device in a turn: its share, or of layerwise offload two layers
    of it, and what is in no layer. Of a sharded plan, two layers are gathered at one time; of weights in fp8, one is cast."""
    found = layers(info)
    cast = found.largest * ITEMSIZE[dtype] // plan.tensor if plan.weight_dtype else 0
    if plan.offload != "layerwise" and not plan.shard:
        return share(info, dtype, plan) + cast
    if plan.shard:
        gathered = LAYERS_AT_ONCE * found.largest * ITEMSIZE[dtype]
        return min(share(info, dtype, plan) + gathered, info.parameters * ITEMSIZE[dtype])
    coming = LAYERS_AT_ONCE * found.largest * _itemsize(dtype, plan) // plan.tensor
    return min(found.rest * ITEMSIZE[dtype] + coming, share(info, dtype, plan)) + cast


def share(info: ModelInfo, dtype: str, plan: Plan) -> int:
    """Bytes of the weights of one rank, wherever they are: all, but for what tensor parallelism, PipeFusion and sharding
    split. Of PipeFusion, those of the stage that has most: blocks are dealt out by number, and Flux's first weigh more."""
    if plan.shard:  # of what is in no layer, sharding leaves small parts whole
        rest = min(layers(info).rest, info.parameters)
        return (rest + (info.parameters - rest) // (plan.ulysses * plan.ring)) * ITEMSIZE[dtype]
    rest = min(layers(info).rest, info.parameters) if plan.weight_dtype else 0
    held = rest * ITEMSIZE[dtype] + (info.parameters - rest) * _itemsize(dtype, plan)
    if plan.pipefusion > 1:
        return math.ceil(held * layers(info).of_stage(plan.pipefusion))
    return held // plan.tensor


def _itemsize(dtype: str, plan: Plan) -> int:
    """Bytes of one weight of a layer, where it is kept."""
    return 1 if plan.weight_dtype else ITEMSIZE[dtype]


def pool(device: str) -> str:
    """The memory that a device has: its own, or the machine's."""
    return "cpu" if device.startswith("cpu") else device


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**28 else f"{nbytes / 2**20:.1f} MiB"


def _holds(group: Group) -> bool:
    return group.state in HOLDING and not group.resting


def _of_host(group: Group) -> int:
    """Bytes of the host's memory that a group's weights take there, asleep or offloaded: a CPU's are the file's own pages."""
    of_one = share(group.found.info, group.key.dtype, group.key.plan)
    return sum(of_one for device in group.devices if pool(device) != "cpu")


def _coming_to_host(group: Group) -> int:
    """Of those, bytes that it is about to take."""
    if group.state != ("starting" if group.key.plan.offload else "dozing"):
        return 0
    loaded, total = group.progress
    return _of_host(group) * (total - loaded) // total if total else _of_host(group)
