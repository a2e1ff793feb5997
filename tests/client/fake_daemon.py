"""A daemon for the client's tests: the real arenas and the real protocol, and a script in place of models and ranks.

It denoises by x · 2 + t, "decodes" by repeating, and says nothing until told where a test wants it slow. It runs in a
thread of the test, or with `python -m tests.client.fake_daemon <path>` as a process that can be killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import zmq

from xditd.daemon.arenas import Arena, Arenas
from xditd.handoff.lane import Lane
from xditd.handoff.segments import Segment
from xditd.protocol import codec
from xditd.protocol import messages as m
from xditd.protocol.errors import Code, XditError
from xditd.protocol.tensors import Tensor

if TYPE_CHECKING:
    import torch

LIMITS = m.Limits(
    header_bytes=codec.MAX_HEADER, frames=64, frame_bytes=1 << 24, arena_bytes=1 << 24, runs=16, queue=16
)
PLAN = m.Plan(devices=("cpu:0",))
MODEL = m.ModelInfo(
    kind="diffusion_models",
    name="x.safetensors",
    part="transformer",
    family="flux",
    variant="dev",
    dtype="float32",
    bytes=1,
    parameters=1,
    facts={"scale": 8, "latent_channels": 16},
)


class FakeDaemon:
    """One life of a daemon.

    Attributes:
        hold: kinds of requests, by tag, that are kept until `let_go`. With "progress", a sample waits after each step;
            without, its steps take no time, and a preview may be written over before anybody has heard of it.
        lanes: clients that share memory get a lane.
        degraded: why runs are opened, or pictures decoded and encoded, otherwise than asked: by the answer's tag.
        goodbyes: clients may say goodbye; without, it is a daemon of before there was one.
        seen: every request that came, in order.
    """

    def __init__(
        self, path: str, *, first_bytes: int = 1 << 20, per_client: int = 1 << 24, version: int = 1
    ) -> None:
        self.endpoint = f"ipc://{path}"
        self.epoch = os.urandom(4).hex()
        self.version = version
        self.lanes = False
        self.degraded: dict[str, str] = {}
        self.goodbyes = True
        self.hold: set[str] = set()
        self.seen: list[Any] = []
        self.gone: list[str] = []
        self._path = path
        self._sizes = (per_client, 4 * per_client, first_bytes)
        self._news = threading.Condition()
        self._held: list[tuple[str, Callable[[], None]]] = []
        self._peers: dict[bytes, Arena | None] = {}
        self._lanes: dict[bytes, Lane] = {}
        self._by_lane: set[tuple[bytes, int]] = set()  # requests that came by a lane
        self._maps: dict[int, Segment] = {}
        self._runs = itertools.count(1)
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)
        self.arenas: Arenas
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event

    # --------------------------------------------------------------------------------------- what a test may say

    def __enter__(self) -> FakeDaemon:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(RuntimeError):  # it was drained, and has stopped
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        for segment in self._maps.values():
            segment.close()

    def wait_for(self, tag: str, count: int = 1) -> list[Any]:
        """The requests of a tag, once there are that many."""
        with self._news:
            assert self._news.wait_for(lambda: len(self._of(tag)) >= count, 10), f"no {tag} came: {self.seen}"
            return self._of(tag)

    def wait_gone(self, count: int) -> None:
        with self._news:
            assert self._news.wait_for(lambda: len(self.gone) >= count, 10)

    def let_go(self, tag: str = "") -> None:
        """Does what is held: of a tag, or all."""
        self.do(lambda: self._let_go(tag))

    def say(self, message: Any, frames: tuple[Any, ...] = ()) -> None:
        """Sends a message to every client."""
        self.do(lambda: [self._send(peer, message, frames) for peer in self._peers])

    def forget_clients(self) -> None:
        """Knows nobody any more, as after a long silence."""
        self.do(self._peers.clear)

    def do(self, work: Callable[[], Any]) -> Any:
        """Does something in the daemon's thread, and waits for it."""
        done: list[Any] = []
        ready = threading.Event()

        def there() -> None:
            done.append(work())
            ready.set()

        self._loop.call_soon_threadsafe(there)
        assert ready.wait(10)
        return done[0]

    def _of(self, tag: str) -> list[Any]:
        return [message for message in self.seen if message.__struct_config__.tag == tag]

    # ------------------------------------------------------------------------------------------ its own thread

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self.arenas = Arenas(
            self._path + ".arena", *self._sizes, self._lease_ended, on_lane=self._lane_opened
        )
        await self.arenas.start()
        context: zmq.Context[Any] = zmq.Context()
        self._router = context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.bind(self.endpoint)
        fd = int(self._router.getsockopt(zmq.FD))
        self._loop.add_reader(fd, self._drain)
        self._started.set()
        await self._stop.wait()
        self._loop.remove_reader(fd)
        await self.arenas.close()
        for peer in list(self._lanes):
            self._close_lane(peer)
        self._router.close(0)
        context.term()

    def _lease_ended(self, token: str) -> None:
        with self._news:
            self.gone.append(token)
            self._news.notify_all()

    def _drain(self) -> None:
        while int(self._router.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            peer, header, *frames = self._router.recv_multipart()
            self._take(peer, codec.decode(header, m.Request, m.REQUESTS), frames)

    def _take(self, peer: bytes, message: Any, frames: list[bytes]) -> None:
        self._unless_held(message.__struct_config__.tag, partial(self._answer, peer, message, frames))
        with self._news:
            self.seen.append(message)
            self._news.notify_all()

    def _lane_opened(self, token: str, lane: Lane) -> None:
        (peer,) = [peer for peer, arena in self._peers.items() if arena is not None and arena.token == token]
        self._lanes[peer] = lane
        self._loop.add_reader(lane.fileno(), self._hear, peer, lane)

    def _hear(self, peer: bytes, lane: Lane) -> None:
        header = lane.receive()
        if header:
            message = codec.decode(header, m.Request, m.REQUESTS)
            self._by_lane.add((peer, message.id))
            self._take(peer, message, [])
        elif header is not None:
            self._close_lane(peer)

    def _close_lane(self, peer: bytes) -> None:
        lane = self._lanes.pop(peer)
        self._loop.remove_reader(lane.fileno())
        lane.close()

    def _unless_held(self, tag: str, work: Callable[[], None]) -> None:
        if tag in self.hold:
            self._held.append((tag, work))
        else:
            work()

    def _let_go(self, tag: str) -> None:
        held, self._held = self._held, []
        for kept, work in held:
            if tag in ("", kept):
                work()
            else:
                self._held.append((kept, work))

    def _answer(self, peer: bytes, message: Any, frames: list[bytes]) -> None:
        try:
            if isinstance(message, m.Sample) and peer in self._peers:
                self._step(peer, message, self._read(peer, message.noise, frames), 1)
                return
            answer, out = self._work(peer, message, frames)
        except XditError as error:
            answer, out = m.Failed(re=message.id, code=str(error.code.value), message=error.message), []
        self._send(peer, answer, tuple(out))

    def _send(self, peer: bytes, message: Any, frames: tuple[Any, ...] = ()) -> None:
        header = codec.encode(message)
        if (peer, getattr(message, "re", None)) in self._by_lane and not frames and peer in self._lanes:
            assert self._lanes[peer].send(header)
            return
        self._router.send_multipart([peer, header, *frames])
        self._loop.call_soon(self._drain)  # the send may have swallowed the edge of what came meanwhile

    def _work(self, peer: bytes, message: Any, frames: list[bytes]) -> tuple[Any, list[bytes]]:
        out: list[bytes] = []
        if isinstance(message, m.Hello):
            if not message.versions[0] <= self.version <= message.versions[1]:
                raise XditError(Code.UNSUPPORTED_VERSION, f"This daemon speaks version {self.version} alone.")
            self._peers[peer] = self.arenas.claim(message.token) if message.token else None
            return self._welcome(message), out
        if peer not in self._peers:
            raise XditError(Code.HELLO_REQUIRED, "Say hello.")
        if isinstance(message, m.Status):
            return self._status(message), out
        if isinstance(message, m.Models):
            return m.ModelList(re=message.id, models=(MODEL,)), out
        if isinstance(message, m.Load):
            return m.Loaded(
                re=message.id, group="g1", plan=PLAN, model=MODEL, dtype="float32", seconds=0.0, warm=True
            ), out
        if isinstance(message, m.Sleep):
            return m.Slept(re=message.id, groups=("g1",), before=(), after=()), out
        if isinstance(message, m.Unload):
            return m.Unloaded(re=message.id, groups=("g1",)), out
        if isinstance(message, m.OpenRun):
            if message.model.name == "missing":
                raise XditError(
                    Code.MODEL_NOT_VISIBLE,
                    "There is no such file.",
                )
            number = next(self._runs)
            self._send(peer, m.Queued(re=message.id, run=number, position=0, phase="loading"))
            degraded = self.degraded.get("run_opened", "")
            return m.RunOpened(
                re=message.id, run=number, group="g1", plan=PLAN, model=MODEL, degraded=degraded
            ), out
        if isinstance(message, m.PutConditioning):
            return m.ConditioningPut(re=message.id, run=message.run, key=message.key), out
        if isinstance(message, m.Denoise):
            outputs = []
            for item in message.items:
                x = self._read(peer, item.x, frames)
                outputs.append(self._write(peer, x * 2 + item.t[0], item.out, out))
            return m.Denoised(re=message.id, outputs=tuple(outputs), seconds=0.0), out
        if isinstance(message, m.Decode):
            latent = self._read(peer, message.latent, frames)
            image = latent[:, :3].permute(0, 2, 3, 1).repeat_interleave(8, 1).repeat_interleave(8, 2).float()
            return m.Decoded(
                re=message.id,
                image=self._write(peer, image, message.out, out),
                seconds=0.0,
                degraded=self.degraded.get("decoded", ""),
            ), out
        if isinstance(message, m.Encode):
            image = (
                self._read(peer, message.image, frames)[:, ::8, ::8, :1]
                .permute(0, 3, 1, 2)
                .repeat(1, 16, 1, 1)
            )
            return m.Encoded(
                re=message.id,
                latent=self._write(peer, image, message.out, out),
                seconds=0.0,
                degraded=self.degraded.get("encoded", ""),
            ), out
        if isinstance(message, m.Cancel):
            return m.Cancelled(re=message.id, run=message.run), out
        if isinstance(message, m.Goodbye):
            del self._peers[peer]
            return m.Farewell(re=message.id), out
        if isinstance(message, m.Close):
            return m.Closed(re=message.id, run=message.run), out
        assert isinstance(message, m.Drain)
        if message.stop:
            self._loop.call_soon(self._stop.set)
        return m.Drained(re=message.id), out

    def _step(self, peer: bytes, message: m.Sample, x: torch.Tensor, step: int) -> None:
        """One step of a sample, and then the next, or the answer."""
        x, total = x + 1, len(message.sigmas) - 1
        shown: list[bytes] = []
        preview = None
        if message.previews or message.preview_frames:
            slot = message.previews[(step - 1) % len(message.previews)] if message.previews else None
            preview = self._write(peer, x, slot, shown)
        sigma = message.sigmas[step]
        event = m.Progress(
            re=message.id, run=message.run, step=step, total=total, sigma=sigma, preview=preview
        )
        self._send(peer, event, tuple(shown))
        if step < total:
            self._unless_held("progress", partial(self._step, peer, message, x, step + 1))
            return
        out: list[bytes] = []
        latent = self._write(peer, x, message.out, out)
        self._send(peer, m.Sampled(re=message.id, latent=latent, steps=total, seconds=0.0), tuple(out))

    def _welcome(self, message: m.Hello) -> m.Welcome:
        capabilities = ("flux", *(("lane",) if self.lanes else ()), *(("goodbye",) if self.goodbyes else ()))
        return m.Welcome(
            re=message.id,
            version=1,
            daemon="0.fake",
            epoch=self.epoch,
            capabilities=capabilities,
            limits=LIMITS,
        )

    def _status(self, message: m.Status) -> m.StatusReport:
        return m.StatusReport(
            re=message.id,
            state="serving",
            version="0.fake",
            epoch=self.epoch,
            pid=os.getpid(),
            uptime=1.0,
            devices=(),
            groups=(),
            runs=(),
            arenas=(),
            arena_bytes=self.arenas.in_use_bytes,
            arena_limit=1,
        )

    # ------------------------------------------------------------------------------------------------ tensor bytes

    def _memory(self, peer: bytes, tensor: Tensor) -> memoryview:
        arena = self._peers[peer]
        assert arena is not None
        assert tensor.segment is not None
        if tensor.segment not in self._maps:
            self._maps[tensor.segment] = Segment(
                os.dup(arena.fd(tensor.segment)), arena.segments[tensor.segment]
            )
        return self._maps[tensor.segment].view(tensor.offset, tensor.nbytes)

    def _read(self, peer: bytes, tensor: Tensor, frames: list[bytes]) -> torch.Tensor:
        import torch  # not above: a daemon that is started to be killed shall start soon

        memory = frames[tensor.frame] if tensor.frame is not None else self._memory(peer, tensor)
        return torch.frombuffer(bytearray(memory), dtype=getattr(torch, tensor.dtype)).view(tensor.shape)

    def _write(self, peer: bytes, value: torch.Tensor, out: Tensor | None, frames: list[bytes]) -> Tensor:
        import torch

        if out is not None:
            target = torch.frombuffer(self._memory(peer, out), dtype=getattr(torch, out.dtype)).view(
                out.shape
            )
            target.copy_(value)
            return out
        flat = value.contiguous().view(torch.uint8).flatten()
        frames.append(bytes(flat.tolist()))
        return Tensor(dtype=str(value.dtype)[6:], shape=tuple(value.shape), frame=len(frames) - 1)


if __name__ == "__main__":
    with FakeDaemon(sys.argv[1]) as daemon:
        print("ready", flush=True)
        daemon._thread.join()
