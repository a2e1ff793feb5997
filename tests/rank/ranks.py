"""Plays the daemon to real rank processes: starts them, feeds them orders, reads their reports."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
import zmq

from tests.warm import Forked, warmth
from xditd.handoff import passing, segments
from xditd.models.families import load
from xditd.models.reading import held
from xditd.protocol import orders
from xditd.protocol.codec import decode, encode
from xditd.protocol.messages import DenoiseItem, Plan
from xditd.protocol.tensors import ALIGNMENT, Tensor
from xditd.rank.transfer import DTYPES, NAMES

START = 120.0
"""Seconds that ranks have to become ready on a busy machine."""


class RankDied(Exception):
    """A rank reported a failure that the test did not expect."""

    def __init__(self, report: orders.RankFailed) -> None:
        super().__init__(f"{report.code}: {report.message}\n{report.traceback}")
        self.report = report


class Slots:
    """One segment, dealt out from its beginning."""

    def __init__(self, number: int, nbytes: int) -> None:
        self.number = number
        self.nbytes = nbytes
        fd = segments.create(nbytes)
        self.fd = os.dup(fd)
        self.memory = segments.Segment(fd, nbytes)
        self.used = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = Tensor(dtype=NAMES[dtype], shape=shape, segment=self.number, offset=self.used)
        self.used += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        assert self.used <= self.nbytes, "the test's segment is too small"
        return tensor

    def put(self, value: torch.Tensor) -> Tensor:
        tensor = self.take(tuple(value.shape), value.dtype)
        self.view(tensor).copy_(value)
        return tensor

    def view(self, tensor: Tensor) -> torch.Tensor:
        memory = self.memory.view(tensor.offset, tensor.nbytes)
        return torch.frombuffer(memory, dtype=DTYPES[tensor.dtype]).view(tensor.shape)


class Ranks:
    """Running ranks of one group. Orders go to all of them, frames to rank 0 alone."""

    def __init__(self, folder: Path, specs: list[orders.RankSpec]) -> None:
        self.specs = specs
        self.context = zmq.Context()
        self.router = self.context.socket(zmq.ROUTER)
        self.router.setsockopt(zmq.LINGER, 0)
        self.router.bind(specs[0].endpoint)
        self.arena, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.reports: list[tuple[int, Any, list[bytes]]] = []
        self.log = (folder / "ranks.log").open("wb")
        self.processes = [self._start(spec, theirs) for spec in specs]
        theirs.close()

    def _start(self, spec: orders.RankSpec, arena: socket.socket) -> subprocess.Popen[bytes] | Forked:
        if spec.device.startswith("cpu"):
            return warmth().rank(spec, self.log.fileno(), arena.fileno() if spec.rank == 0 else -1)
        fds = (arena.fileno(),) if spec.rank == 0 else ()
        spec = msgspec.structs.replace(spec, arena_fd=fds[0] if fds else -1)
        process = subprocess.Popen(
            [sys.executable, "-m", "xditd.rank"],
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=self.log,
            pass_fds=fds,
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(spec))
        process.stdin.close()
        return process

    # ---------------------------------------------------------------------------------------------- orders

    def send(self, order: orders.Order, *frames: Any) -> None:
        for spec in self.specs:
            identity = f"{spec.group}.{spec.generation}.{spec.rank}".encode()
            self.router.send_multipart([identity, encode(order), *(frames if spec.rank == 0 else ())])

    def slots(self, number: int = 1, nbytes: int = 1 << 24) -> Slots:
        slots = Slots(number, nbytes)
        passing.pass_segment(self.arena, number, slots.fd, nbytes)
        os.close(slots.fd)
        return slots

    # --------------------------------------------------------------------------------------------- reports

    def report(self, timeout: float = 60.0) -> tuple[int, Any, list[bytes]]:
        """The next report: of which rank, what, and its frames."""
        if not self.router.poll(timeout * 1000):
            raise TimeoutError(f"No rank reported within {timeout} s; {self.words()}")
        identity, header, *frames = self.router.recv_multipart()
        return int(identity.rsplit(b".", 1)[1]), decode(header, orders.Report, orders.REPORTS), frames

    def wait(self, kind: type, timeout: float = 60.0) -> tuple[Any, list[bytes]]:
        """The next report of that kind; an unexpected failure is raised."""
        while True:
            _, report, frames = self.report(timeout)
            if isinstance(report, kind):
                return report, frames
            if isinstance(report, orders.RankFailed):
                raise RankDied(report)

    def ready(self) -> list[orders.RankReady]:
        """Waits until every rank is."""
        return [self.wait(orders.RankReady, START)[0] for _ in self.specs]

    def denoise(
        self,
        xs: list[torch.Tensor],
        t: tuple[float, ...],
        *,
        run: int = 1,
        key: str = "c",
        timeout: float = 60.0,
    ) -> list[torch.Tensor]:
        """What the network predicts at each x, of one turn, with a conditioning that the run has."""
        described, frames = framed(xs)
        items = tuple(DenoiseItem(x=x, t=t, conditioning=key) for x in described)
        self.send(orders.TurnDenoise(order=run, run=run, items=items), *frames)
        done, inline = self.wait(orders.TurnDone, timeout)
        assert done.order == run
        return [tensor_of(output, inline) for output in done.outputs]

    def turn(self, order: Any, *frames: Any) -> tuple[orders.TurnDone, list[torch.Tensor]]:
        """One turn, and its outputs that came as frames."""
        self.send(order, *frames)
        done, inline = self.wait(orders.TurnDone)
        assert done.order == order.order
        return done, [tensor_of(t, inline) for t in done.outputs if t.frame is not None]

    def condition(self, run: int, key: str, tensors: Mapping[str, torch.Tensor], **values: float) -> None:
        named, frames = framed(list(tensors.values()))
        self.send(
            orders.SetConditioning(
                run=run, key=key, tensors=dict(zip(tensors, named, strict=True)), values=values
            ),
            *frames,
        )

    def words(self) -> str:
        self.log.flush()
        return Path(self.log.name).read_text(errors="replace")[-4000:]

    def codes(self, timeout: float = 30.0) -> list[int]:
        """Exit codes, once all have ended."""
        end = time.monotonic() + timeout
        return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        self.router.close()
        self.context.term()
        self.arena.close()
        self.log.close()


def framed(values: list[torch.Tensor]) -> tuple[list[Tensor], list[Any]]:
    """Tensors as frames of one message."""
    described = [
        Tensor(dtype=NAMES[value.dtype], shape=tuple(value.shape), frame=i) for i, value in enumerate(values)
    ]
    return described, [value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for value in values]


def tensor_of(tensor: Tensor, frames: list[bytes]) -> torch.Tensor:
    assert tensor.frame is not None
    return torch.frombuffer(bytearray(frames[tensor.frame]), dtype=DTYPES[tensor.dtype]).view(tensor.shape)


def check_weights(what: str, family: str, path: Path, ready: list[orders.RankReady], shared: int) -> None:
    """Where ranks share the weights, each holds at most its part of what one process holds, and a tenth of that part."""
    alone = load(family, path, "transformer", torch.device("cpu"), torch.float32)
    share = max(report.weights for report in ready) / held(alone.backbone)
    print(f"\n  {what}: each rank holds at most {share:.1%} of the weights")
    assert 1 / shared <= share <= (1.1 / shared if shared > 1 else 1)


@contextmanager
def running(
    folder: Path,
    *,
    path: str | os.PathLike[str] = "",
    family: str = "flux",
    part: str = "transformer",
    cfg: int = 1,
    ulysses: int = 1,
    ring: int = 1,
    tensor: int = 1,
    pipefusion: int = 1,
    patch: int = 1,
    dtype: str = "float32",
    options: Mapping[str, str] | None = None,
    wait: bool = True,
    parent: int = 0,
    device: str = "cpu",
    compiled: bool = False,
    plan: Mapping[str, int] | None = None,
) -> Iterator[Ranks]:
    """Ranks of one plan, ready unless `wait` is false."""
    world = cfg * ulysses * ring * tensor * pipefusion * patch
    folder.mkdir(parents=True, exist_ok=True)
    devices = tuple(f"{device}:{i}" for i in range(world))
    specs = [
        orders.RankSpec(
            group="g",
            generation=1,
            rank=rank,
            world=world,
            device=devices[rank],
            plan=Plan(
                devices=devices,
                cfg=cfg,
                ulysses=ulysses,
                ring=ring,
                tensor=tensor,
                pipefusion=pipefusion,
                patch=patch,
                **(plan or {}),
            ),
            endpoint=f"ipc://{folder}/ranks",
            store=f"file://{folder}/store",
            parent=parent or os.getpid(),
            path=os.fspath(path),
            part=part,
            family=family,
            variant="",
            dtype=dtype,
            threads=1,
            compile=compiled,
            options=dict(options or {}),
        )
        for rank in range(world)
    ]
    ranks = Ranks(folder, specs)
    try:
        if wait:
            ranks.ready()
        yield ranks
    finally:
        ranks.stop()
