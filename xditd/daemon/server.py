"""The daemon, assembled: its two doors, its core, and what it reports of itself. One event loop, no torch."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import zmq
from msgspec import Struct

from xditd import __version__
from xditd.catalog.catalog import Catalog
from xditd.daemon import devices as hardware
from xditd.daemon import states
from xditd.daemon.chronicle import Chronicle
from xditd.daemon.clients import OURSELVES, Clients
from xditd.daemon.config import Config
from xditd.daemon.deadlines import Deadlines
from xditd.daemon.devices import Memories
from xditd.daemon.dispatcher import Dispatcher
from xditd.daemon.gauges import Gauges
from xditd.daemon.groups import Restarts
from xditd.daemon.metrics import Metrics
from xditd.daemon.nursery import Nursery
from xditd.daemon.ranks import Ranks
from xditd.daemon.requests import Requests
from xditd.daemon.residency import Keep, Residency
from xditd.daemon.session import Session
from xditd.daemon.sight import Sight
from xditd.protocol import messages as m
from xditd.protocol.endpoints import Endpoint

log = logging.getLogger("xditd.server")


class Server:
    """One daemon's life.

    Attributes:
        state: a row of `states.DAEMON`.
        ready: set when it serves and all models to preload are there, or refused.
    """

    def __init__(
        self, config: Config, endpoint: Endpoint, runtime: Path, catalog: Catalog, stop: Callable[[], None]
    ) -> None:
        """
        Args:
            endpoint: where clients come.
            runtime: a folder of ours alone, for the ranks' socket and rendezvous files.
            stop: asks whoever runs the server to end it.

        Raises:
            XditError: `bad_config` where devices that it names are not there.
            zmq.ZMQError: an endpoint cannot be bound.
        """
        self.config = config
        self.state = "starting"
        self.ready = asyncio.Event()
        self.preloads = [m.PreloadStatus(model=p.ref, state="waiting") for p in config.models.preload]
        self.started = time.monotonic()
        self._look = 0.0  # monotonic seconds of the next look at what needs no haste
        self.devices = hardware.own(config.devices.kind, config.devices.use, config.devices.cpu_ranks)
        hardware.check_attention(config.compute.attention, self.devices)
        self.gauges = Gauges(self.devices)
        self._context: zmq.Context[Any] = zmq.Context()
        metrics = Metrics(config.metrics) if config.metrics.port else None
        self.sight = Sight(Chronicle(lambda peer, told: self.clients.answer(peer, told), time.time), metrics)
        self.clients = Clients(
            self._context,
            endpoint,
            config,
            handle=self._handle,
            gone=self._client_gone,
            answered=self._preloaded,
            noticed=self.sight.client,
            metrics=metrics,
        )
        self.nursery = Nursery()
        self.ranks = Ranks(self._context, runtime, config, self._arena_of, self.nursery)
        memories = Memories(self.devices, config.devices.reserve_memory, config.devices.cpu_memory)
        limits = config.deadlines
        self.dispatcher = Dispatcher(
            self.clients,
            self.ranks,
            self.sight,
            Deadlines(
                limits.load,
                limits.first_turn,
                limits.turn,
                leave=limits.stop,
                run_idle=limits.run_idle,
                queued=limits.queued,
            ),
            Restarts(config.restart.limit, config.restart.window, config.restart.backoff),
            _residency(memories, config),
            queue=config.limits.queue,
            places=config.limits.runs_per_group,
            weights=config.devices.weights,
        )
        self.ranks.dispatcher = self.dispatcher
        self.requests = Requests(
            self.clients,
            self.dispatcher,
            catalog,
            self.devices,
            dtype=config.compute.dtype,
            fallback=config.compute.fallback,
            runs_per_client=config.limits.runs_per_client,
            frame_bytes_per_client=config.arena.per_client_bytes,
            sight=self.sight,
            stop=stop,
        )

    def go(self, event: str) -> None:
        self.state = states.after(states.DAEMON, self.state, event)
        self.sight.daemon(self.state)

    async def start(self) -> None:
        """Opens the doors, and loads what the configuration names."""
        self.gauges.start()
        if self.sight.metrics is not None:
            self.sight.metrics.serve(lambda: self.report(0))
        await self.clients.start()
        self._start_nursery()
        preloads = self.config.models.preload
        for number, preload in enumerate(preloads):
            self.requests.preload(OURSELVES, m.Load(id=number, model=preload.ref, plan=preload.plan))
        if not preloads:
            self._serve()

    def _start_nursery(self) -> None:
        """Before anybody asks for ranks, so that even the first are forked."""
        debug = self.config.debug
        if debug.nursery:
            self.nursery.inherit(*debug.nursery)
        elif self.config.nursery and not debug.rank_command:
            self.nursery.start("cpu" if self.devices[0].name.startswith("cpu") else "cuda")

    def _preloaded(self, reply: Struct) -> None:
        """One more of the models to preload is ready, or will not be: after the last one the daemon is ready."""
        if isinstance(reply, m.Failed) and reply.re is not None:
            log.error("A model to preload is not there: %s", reply.message, extra={"code": reply.code})
            self._settle(reply.re, "refused", reply.code, reply.message)
        elif isinstance(reply, m.Loaded):
            self._settle(reply.re, "ready")
        if self.state == "starting" and all(preload.state != "waiting" for preload in self.preloads):
            self._serve()

    def _settle(self, number: int, state: str, code: str = "", message: str = "") -> None:
        model = self.preloads[number].model
        self.preloads[number] = m.PreloadStatus(model=model, state=state, code=code, message=message)

    def _serve(self) -> None:
        self.go("ready")
        self.ready.set()

    def drain(self) -> None:
        """Takes nothing new from now on."""
        if self.state == "serving":
            self.go("drain")
        self.dispatcher.draining = True

    @property
    def busy(self) -> bool:
        """Whether a request of a client is under way."""
        return any(run.asked is not None for run in self.dispatcher.runs.values())

    @property
    def empty(self) -> bool:
        """Whether all ranks are gone."""
        return not self.ranks.executor.processes

    def end_runs(self) -> None:
        """Ends every run and tells every group to leave."""
        self.go("stop")
        self.dispatcher.close(time.monotonic())
        self.sight.chronicle.close()

    async def close(self) -> None:
        """Kills what is left and closes the doors."""
        self.gauges.close()
        if self.sight.metrics is not None:
            self.sight.metrics.close()
        await self.clients.close()
        self.ranks.close()
        self._context.destroy(linger=200)

    def tick(self) -> None:
        """The clock: deadlines, and clients that left without a word."""
        now = time.monotonic()
        self.dispatcher.tick(now)
        if now >= self._look:
            self._look = now + 1.0
            self.clients.forget_quiet(self.dispatcher.runs.clients(), now)
            self.clients.watch_descriptors()
            self.ranks.executor.reap_strays()

    def report(self, request: int) -> m.StatusReport:
        """What `xditctl status` shows."""
        now = time.monotonic()
        dispatcher, arenas = self.dispatcher, self.clients.arenas
        leases = arenas.list() if arenas is not None else []
        groups = dispatcher.fleet.groups.values()
        positions = dispatcher.tidings.positions(now)
        pids = [rank.pid for group in groups for rank in group.ranks if rank.pid and not rank.gone]
        rss = {pid: used for pid in pids if (used := _rss(pid)) is not None}
        names = {s.arena.token: s.name for s in self.clients.sessions.values() if s.arena is not None}
        return m.StatusReport(
            re=request,
            state=self.state if not dispatcher.draining or self.state != "serving" else "draining",
            version=__version__,
            epoch=self.clients.epoch,
            pid=os.getpid(),
            uptime=now - self.started,
            devices=self.gauges.status(dispatcher.turns.busy, now),
            groups=tuple(group.status(dispatcher.runs.count_on(group), rss) for group in groups),
            runs=tuple(run.status(now, positions.get(run.id, 0)) for run in dispatcher.runs.values()),
            arenas=tuple(
                m.ArenaStatus(
                    client=names.get(arena.token, ""),
                    pid=arena.pid,
                    uid=arena.uid,
                    segments=len(arena.segments),
                    bytes=arena.nbytes,
                )
                for arena in leases
            ),
            arena_bytes=arenas.in_use_bytes if arenas is not None else 0,
            arena_limit=self.config.arena.total_bytes,
            clients=len(self.clients.sessions),
            preloads=tuple(self.preloads),
            nursery=self.nursery.status(),
        )

    def _handle(self, session: Session, message: Any, frames: Sequence[Any]) -> None:
        if isinstance(message, m.Status):
            self.clients.answer(session.peer, self.report(message.id))
        else:
            self.requests.handle(session, message, frames)

    def _client_gone(self, peer: bytes, segments: tuple[int, ...]) -> None:
        self.sight.chronicle.forget(peer)
        self.ranks.forget_segments(segments)
        self.dispatcher.client_gone(peer, segments, time.monotonic())

    def _arena_of(self, peer: bytes) -> Any:
        session = self.clients.sessions.get(peer)
        return session.arena if session is not None else None


def _residency(memories: Memories, config: Config) -> Residency:
    models = config.models
    return Residency(
        memories,
        Keep(models.keep_alive, models.keep_alive_of, models.sleep_after, models.sleep_after_of),
        margin=config.devices.activation_memory,
        patience=models.patience,
    )


def _rss(pid: int) -> int | None:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None
