"""Clients at work, and somebody who kills, stops, cancels, unloads and frees at random beside them.

Everybody has a generator of his own from one seed; what they meet in which order is the machine's.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.live.service import Service
from xditd.client import Client, Run
from xditd.client.buffers import Buffer
from xditd.daemon.work import spell
from xditd.protocol.errors import XditError
from xditd.protocol.messages import Happened, ModelRef, PlanRequest

SHAPE = (1, 16, 4, 4)
MODELS = (
    (ModelRef(kind="echo", name="echo", dtype="float32"), PlanRequest(replicas=2, scheduling="adaptive")),
    (ModelRef(kind="echo", name="echo", dtype="float16"), PlanRequest(devices=("0", "1"), ring=2)),
    (ModelRef(kind="echo", name="echo", dtype="bfloat16"), PlanRequest(devices=("3",))),
)
"""On replicas, on a world of two ranks, and alone; in three dtypes the echo is three models."""

ENDS = frozenset({"run_cancelled", "rank_lost", "no_such_run", "run_lost", "deadline_exceeded"})
"""How a run may end beside being closed: cancelled or unloaded, its group dead too often, or over already."""

REFUSALS = frozenset({"run_cancelled", "rank_lost", "queue_full", "draining"})
"""How asking for one may end: its place in line was cancelled, or its model unloaded, before it came to anything."""


LIVING = ("starting", "importing", "joining", "loading", "ready", "asleep")
"""Phases of a rank that can be killed. Only one that is ready is stopped: a turn's deadline finds it soon."""


@dataclass
class Crowd:
    """What became of the clients' runs.

    Attributes:
        ends: of runs that were opened, by how they ended: "closed", "left" by a client that went, or a code.
        refusals: of runs that never were, by code.
        wrong: what must not be.
    """

    ends: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    steps: int = 0


class Clients:
    """Threads that open runs, one after the other, until the daemon drains."""

    def __init__(self, service: Service, number: int, seed: int) -> None:
        self.crowd = Crowd()
        self._service = service
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._guarded, args=(i, seed)) for i in range(number)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self, seconds: float) -> None:
        for thread in self._threads:
            thread.join(seconds)
        self.crowd.wrong += [f"{thread.name} hangs" for thread in self._threads if thread.is_alive()]

    def _guarded(self, number: int, seed: int) -> None:
        try:
            self._live(number, random.Random(1000 * seed + number))
        except Exception as error:
            with self._lock:
                self.crowd.wrong.append(f"client {number}: {error!r}")

    def _live(self, number: int, chance: random.Random) -> None:
        shared = number % 4 != 0
        client = self._client(number, shared)
        try:
            while True:
                ((ref, plan),) = chance.choices(MODELS, (8, 1, 1))
                try:
                    run = client.open_run(ref, plan, priority=chance.randint(-1, 1), timeout=120)
                except XditError as error:
                    self._note(self.crowd.refusals, spell(error.code), REFUSALS)
                    if error.code == "draining":
                        return
                    continue
                if chance.random() < 0.05:  # it goes in the middle of a run, without a word for it
                    client.close()
                    self._note(self.crowd.ends, "left", {"left"})
                    client = self._client(number, shared)
                    continue
                self._note(self.crowd.ends, self._use(run, chance), ENDS | {"closed"})
        finally:
            client.close()

    def _client(self, number: int, shared: bool) -> Client:
        return Client(self._service.endpoint, name=f"client {number}", timeout=120, shared_memory=shared)

    def _use(self, run: Run, chance: random.Random) -> str:
        """Some steps, or a whole sample. Returns how the run ended."""
        x = Buffer(run.id.to_bytes(8, "little") * 64, "bfloat16", SHAPE)
        try:
            with run:
                run.put_conditioning("c", {})
                if chance.random() < 0.5:
                    sigmas = [1 - step / 8 for step in range(8)] + [0.0]
                    answers = [run.sample(x, sigmas, "c")]
                else:
                    answers = [run.denoise([(x, 0.5, "c")])[0] for _ in range(chance.randint(1, 8))]
        except XditError as error:
            return spell(error.code)
        with self._lock:
            self.crowd.steps += len(answers)
            if any(bytes(answer.memory) != bytes(x.memory) for answer in answers):
                self.crowd.wrong.append(f"run {run.id} got another one's answer")
        return "closed"

    def _note(self, counter: Counter[str], how: str, expected: frozenset[str] | set[str]) -> None:
        with self._lock:
            counter[how] += 1
            if how not in expected:
                self.crowd.wrong.append(f"a run ended with {how}")


class Chaos:
    """A thread that does harm, about so many times in a second."""

    def __init__(self, service: Service, rate: float, seed: int) -> None:
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._rate = rate
        self._chance = random.Random(seed)
        self._client = service.client(name="chaos", timeout=60)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._rage)
        self._deeds: dict[str, tuple[int, Callable[[], object]]] = {
            "kill": (4, lambda: self._signal(signal.SIGKILL)),
            "stop": (1, lambda: self._signal(signal.SIGSTOP)),
            "cancel": (5, self._cancel),
            "unload": (2, lambda: self._unload(force=False)),
            "unload by force": (2, lambda: self._unload(force=True)),
            "sleep": (2, self._sleep),
            "free memory": (1, self._client.free_memory),
            "load": (2, self._load),
        }

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._over.set()
        self._thread.join(120)
        assert not self._thread.is_alive()
        self._client.close()

    def _rage(self) -> None:
        names, weights = zip(*((name, weight) for name, (weight, _) in self._deeds.items()), strict=True)
        while not self._over.wait(self._chance.expovariate(self._rate)):
            (name,) = self._chance.choices(names, weights)
            try:
                if self._deeds[name][1]() is not False:
                    self.done[name] += 1
            except XditError as error:
                if error.code in ("internal", "daemon_lost", "timeout"):
                    self.wrong.append(f"{name}: {error!r}")
                self.done[f"{name}: {spell(error.code)}"] += 1

    def _signal(self, number: int) -> bool:
        pids = [
            rank.pid
            for group in self._client.status().groups
            for rank in group.ranks
            if rank.pid and rank.phase in (("ready",) if number == signal.SIGSTOP else LIVING)
        ]
        with contextlib.suppress(ProcessLookupError):
            if pids:
                os.kill(self._chance.choice(pids), number)
        return bool(pids)

    def _sleep(self) -> bool:
        groups = self._client.status().groups
        if groups:
            self._client.sleep(group=self._chance.choice(groups).group)
        return bool(groups)

    def _load(self) -> bool:
        """Asks, and does not wait: the model may have to wait for others' room."""
        try:
            self._client.load(*self._chance.choice(MODELS), timeout=0.1)
        except XditError as error:
            if error.code != "timeout":
                raise
        return True

    def _cancel(self) -> bool:
        runs = self._client.status().runs
        if runs:
            self._client.cancel(self._chance.choice(runs).run)
        return bool(runs)

    def _unload(self, *, force: bool) -> bool:
        groups = self._client.status().groups
        if groups:
            self._client.unload(group=self._chance.choice(groups).group, force=force)
        return bool(groups)


class Witness:
    """A client that hears everything from the daemon's beginning."""

    def __init__(self, service: Service) -> None:
        self.heard: list[Happened] = []
        self._client = service.client(name="witness")
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        with contextlib.suppress(XditError):  # closed
            self._client.watch(self.heard.append, after=0)

    def close(self) -> None:
        self._client.close()
        self._thread.join(30)

    def runs(self, event: str) -> Counter[int]:
        return Counter(h.run for h in list(self.heard) if h.event == event and h.run is not None)

    def count(self, event: str) -> int:
        return sum(h.event == event for h in list(self.heard))
