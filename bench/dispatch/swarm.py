"""Many clients at once: each does its runs one after the other, each run some steps on an echo model."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from xditd.client import Client
from xditd.client.buffers import Buffer
from xditd.protocol.messages import PlanRequest

SHAPE = (1, 16, 4, 4)
NBYTES = 2 * 16 * 4 * 4


@dataclass(slots=True)
class Swarm:
    """What became of the clients.

    Attributes:
        seconds: from the common start until each client's last run had ended.
        groups: how many runs each group did.
        wrong: answers that were not what was asked; always empty, or something is broken.
    """

    seconds: list[float] = field(default_factory=list)
    groups: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    @property
    def makespan(self) -> float:
        return max(self.seconds)


def swarm(
    endpoint: str, clients: int, runs: int, steps: int, plan: PlanRequest, *, whole: bool = False
) -> Swarm:
    """Plays the clients, each in a thread of its own with a connection of its own.

    Args:
        whole: a run asks for its steps in one `sample` instead of one by one.
    """
    result = Swarm(seconds=[0.0] * clients)
    ready, lock = threading.Barrier(clients + 1), threading.Lock()
    begin = [0.0]

    def live(number: int) -> None:
        with Client(endpoint, name=f"client {number}", timeout=120) as client:
            ready.wait(300)
            for index in range(runs):
                group, fault = _one_run(client, number * runs + index, steps, plan, whole)
                with lock:
                    result.groups[group] += 1
                    if fault:
                        result.wrong.append(fault)
            result.seconds[number] = time.monotonic() - begin[0]

    def guarded(number: int) -> None:
        try:
            live(number)
        except Exception as error:
            with lock:
                result.wrong.append(f"client {number}: {error}")
            ready.abort()

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    begin[0] = time.monotonic()
    ready.wait(300)
    begin[0] = time.monotonic()
    for thread in threads:
        thread.join()
    return result


def _one_run(client: Client, number: int, steps: int, plan: PlanRequest, whole: bool) -> tuple[str, str]:
    """Its group, and what was wrong with it."""
    x = Buffer(number.to_bytes(8, "little") * (NBYTES // 8), "bfloat16", SHAPE)
    with client.open_run("echo/echo", plan) as run:
        run.put_conditioning("c", {}, wait=False)
        if whole:
            sigmas = [1 - step / steps for step in range(steps)] + [0.0]
            answers = [run.sample(x, sigmas, "c")]
        else:
            answers = [run.denoise([(x, 0.5, "c")])[0] for _ in range(steps)]
        same = all(bytes(answer.memory) == bytes(x.memory) for answer in answers)
        return run.group, "" if same else f"run {run.id} got another one's answer"


def jain(shares: Sequence[float]) -> float:
    """Jain's fairness of shares: 1 where all are equal, 1/n where one has everything."""
    return sum(shares) ** 2 / (len(shares) * sum(share * share for share in shares))
