"""What each request of a client does: checked against the model's facts, then handed to the dispatcher.

Everything that can be refused is refused here, before a rank is asked: a failure in one rank poisons its group.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from typing import Any

import msgspec

from xditd.catalog import families
from xditd.catalog.catalog import Catalog, Found, FoundLora
from xditd.catalog.roots import ALIASES
from xditd.daemon import choices, costs, dtypes, planner
from xditd.daemon.checks import check_work
from xditd.daemon.departures import Departure
from xditd.daemon.devices import Device
from xditd.daemon.dispatcher import Dispatcher
from xditd.daemon.fallback import Ladder
from xditd.daemon.groups import Group
from xditd.daemon.ports import ClientPort
from xditd.daemon.runs import Key, Run
from xditd.daemon.session import Session
from xditd.daemon.sight import Sight
from xditd.daemon.work import failed, spell, step_effort
from xditd.protocol import messages as m
from xditd.protocol.codec import MAX_HEADER
from xditd.protocol.errors import Code, XditError
from xditd.protocol.plans import LoraRef

log = logging.getLogger("xditd.requests")


MAX_CONDITIONINGS = 256
"""Conditionings of one run."""


class Requests:
    """The requests that need no socket: models, groups, runs. The server answers Hello and Status itself."""

    def __init__(
        self,
        clients: ClientPort,
        dispatcher: Dispatcher,
        catalog: Catalog,
        devices: Sequence[Device],
        *,
        dtype: str = "",
        fallback: str = "auto",
        runs_per_client: int = 16,
        frame_bytes_per_client: int = 4 << 30,
        sight: Sight,
        stop: Callable[[], None],
    ) -> None:
        """
        Args:
            sight: where clients watch, and what is told that the daemon drains.
            dtype: compute dtype where a request names none; "" leaves it to `dtypes.choose`.
            fallback: "auto" or "never", where a request does not say.
            frame_bytes_per_client: that the daemon keeps for the runs of a client without shared memory.
            stop: ends the daemon, after a Drain that asks for it.
        """
        self.clients = clients
        self.dispatcher = dispatcher
        self.catalog = catalog
        self.devices = {device.name: device for device in devices}
        self.dtype = dtype
        self.fallback = fallback
        self.runs_per_client = runs_per_client
        self.frame_bytes_per_client = frame_bytes_per_client
        self.sight = sight
        self.stop = stop
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining: list[tuple[bytes, m.Drain]] = []  # not answered yet

    def handle(self, session: Session, message: Any, frames: Sequence[Any]) -> None:
        """Does what a request asks; its answer follows through the port, at once or later.

        Raises:
            XditError: the request is refused.
        """
        now = time.monotonic()
        match message:
            case m.Models():
                self._spawn(message.id, session.peer, session.name, self._models(session, message))
            case m.Explain():
                self._spawn(message.id, session.peer, session.name, self._explain(session, message))
            case m.Load() | m.OpenRun():
                self._spawn(message.id, session.peer, session.name, self._open(session, message))
            case m.Unload():
                self._unload(session, message, now)
            case m.Sleep():
                self._sleep(session, message, now)
            case m.FreeMemory():
                self._free_memory(session, message, now)
            case m.PutConditioning():
                run = self._run(session, message.run)
                info = run.found.info
                rules = families.transformer_of(info, "take conditioning")
                rules.check_conditioning(info, message.tensors, message.values)
                self._check_room(run, message.key, frames)
                self.dispatcher.put(run, message, frames, now)
            case m.Denoise() | m.Sample() | m.Decode() | m.Encode() | m.EncodeText():
                run = self._run(session, message.run)
                check_work(run, message)
                self.dispatcher.ask(run, message, frames, now)
            case m.Cancel():
                run = self._run(session, message.run, anybody=True)
                log.info("Cancelled by %s.", session.name, extra={"run": run.id})
                run.due.append((session.peer, m.Cancelled(re=message.id, run=run.id)))
                self.dispatcher.stop(run, f"Run {run.id} was cancelled.", now)
            case m.Close():
                run = self._run(session, message.run)
                run.closing = True
                run.due.append((session.peer, m.Closed(re=message.id, run=run.id)))
                self.dispatcher.stop(run, f"Run {run.id} was closed.", now)
            case m.Drain():
                self.sight.daemon("draining")
                log.warning("Draining: no new runs. Asked by %s.", session.name)
                self._draining.append((session.peer, message))
                self.dispatcher.drain(self._drained)
            case m.Watch():
                self.sight.chronicle.watch(session.peer, message)
            case _:
                raise XditError(Code.BAD_MESSAGE, "A connection says hello once, at its beginning.")

    def preload(self, peer: bytes, request: m.Load) -> None:
        """Loads a model that the configuration names; a failure is logged by whoever answers `peer`."""
        self._spawn(request.id, peer, "preload", self._load(peer, request))

    def _spawn(self, request: int, peer: bytes, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Work that reads the disk goes on beside the event loop."""

        async def guarded() -> None:
            try:
                await work
            except XditError as error:
                self.clients.answer(peer, failed(request, error.code, error.message))
            except Exception:
                log.exception("Request %d of %s failed.", request, name)
                message = "The daemon failed at this request; its log has the traceback."
                self.clients.answer(peer, failed(request, Code.INTERNAL, message))

        task = asyncio.get_running_loop().create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ------------------------------------------------------------------------------------------- models

    async def _models(self, session: Session, message: m.Models) -> None:
        models, skipped = await asyncio.to_thread(self.catalog.list, message.kind)
        folders = tuple(str(folder) for folder in self.catalog.roots.folders(message.kind))
        answer = m.ModelList(re=message.id, models=tuple(models), skipped=tuple(skipped), roots=folders)
        self.clients.answer(session.peer, _fit(answer))

    async def _explain(self, session: Session, message: m.Explain) -> None:
        found: Found = await asyncio.to_thread(self.catalog.find, message.model)
        info, owned = found.info, list(self.devices)
        first = planner.devices(message.plan.devices, owned)[0]
        dtype = dtypes.choose(
            info, asked=message.model.dtype, configured=self.dtype, is_cuda=self.devices[first].is_cuda
        )
        residency = self.dispatcher.fleet.residency
        size = message.width, message.height
        effort = step_effort(info.facts, size, costs.calls_of(info))
        steps = self.dispatcher.placing.experience.steps(found.path, info.part, dtype, effort)
        candidates, refusal = choices.explain(
            message.plan,
            info,
            owned,
            dtype,
            residency.margin,
            self._too_large(found, dtype),
            size,
            lambda plan: costs.estimate(info, plan, size, dtype, self.devices[plan.devices[0]].model, steps),
        )
        code, text = (spell(refusal.code), refusal.message) if refusal is not None else ("", "")
        answer = m.Explained(
            re=message.id, model=info, dtype=dtype, candidates=candidates, code=code, message=text
        )
        self.clients.answer(session.peer, answer)

    def _too_large(self, found: Found, dtype: str) -> Callable[[m.Plan], str]:
        """Of a plan of a model: why it can never have room."""
        residency = self.dispatcher.fleet.residency
        return lambda plan: residency.too_large(found, Key(found.path, found.info.part, dtype, plan))

    async def _find(self, ref: m.ModelRef, request: m.PlanRequest) -> tuple[Found, tuple[Key, ...], Ladder]:
        """The file, what each of its replicas is, and what there may be instead of them."""
        found: Found = await asyncio.to_thread(self.catalog.find, ref)
        plans = planner.replicas(request, found.info, list(self.devices))
        is_cuda = self.devices[plans[0].devices[0]].is_cuda
        dtype = dtypes.choose(found.info, asked=ref.dtype, configured=self.dtype, is_cuda=is_cuda)
        too_large = self._too_large(found, dtype)
        plans = tuple(planner.with_room(plan, found.info, too_large) for plan in plans)
        falls = planner.fallback(request, self.fallback)
        less = planner.rungs(plans[0], found.info) if falls else ()
        keys = tuple(Key(found.path, found.info.part, dtype, plan) for plan in plans)
        return found, keys, Ladder.of(plans, less, splits=falls)

    async def _find_loras(self, refs: Sequence[LoraRef], found: Found) -> list[FoundLora]:
        """The LoRAs' files, each found to fit the model.

        Raises:
            XditError: what is wrong with one of them.
        """
        return [await asyncio.to_thread(self.catalog.find_lora, ref, found) for ref in refs]

    async def _open(self, session: Session, message: m.OpenRun | m.Load) -> None:
        if isinstance(message, m.Load):
            await self._load(session.peer, message, lambda: session.alive)
            return
        found, keys, ladder = await self._find(message.model, message.plan)
        loras = await self._find_loras(message.lora, found)
        if not session.alive:
            return
        open_runs = len(self.dispatcher.runs.of(session.peer))
        if open_runs >= self.runs_per_client:
            raise XditError(
                Code.QUEUE_FULL,
                f"This connection has {open_runs} open runs, which is the limit; close one first.",
            )
        run = self.dispatcher.open(
            session.peer, session.name, message, found, keys, time.monotonic(), loras, ladder
        )
        with_them = "".join(f" {_told(match)}" for match in run.lora)
        log.info("Opened by %s: %s.%s", session.name, message.model.name, with_them, extra={"run": run.id})

    async def _load(self, peer: bytes, message: m.Load, waits: Callable[[], bool] = lambda: True) -> None:
        """
        Args:
            waits: whether whoever asked is still there, when the files have been read.
        """
        found, keys, ladder = await self._find(message.model, message.plan)
        loras = tuple(each.match for each in await self._find_loras(message.lora, found))
        if not waits():
            return
        self.dispatcher.refuse_if_draining()
        self.dispatcher.fleet.load(peer, message, found, keys, time.monotonic(), loras, ladder)

    def _unload(self, session: Session, message: m.Unload, now: float) -> None:
        groups = self._meant(message)
        before = self._memory({device for group in groups for device in group.devices})
        self.dispatcher.unload(groups, message.force, now)
        log.info("Unloaded by %s: %s.", session.name, ", ".join(group.name for group in groups))
        self.dispatcher.departures.add(Departure(session.peer, message, groups, before))

    def _sleep(self, session: Session, message: m.Sleep, now: float) -> None:
        groups = self._meant(message)
        before = self._memory({device for group in groups for device in group.devices})
        self.dispatcher.sleep(groups, now)
        log.info("Put to sleep by %s: %s.", session.name, ", ".join(group.name for group in groups))
        self.dispatcher.departures.add(Departure(session.peer, message, groups, before))

    def _meant(self, message: m.Unload | m.Sleep) -> list[Group]:
        """The groups that a request names."""
        groups = self.dispatcher.fleet.groups.values()
        meant = [group for group in groups if group.alive and _is_meant(message, group)]
        if not meant:
            what = message.group or (message.model.name if message.model else "nothing")
            raise XditError(Code.NO_SUCH_GROUP, f"There is no group {what!r}; `xditctl status` lists them.")
        return meant

    def _free_memory(self, session: Session, message: m.FreeMemory, now: float) -> None:
        devices = planner.devices(message.devices, list(self.devices))
        before = self._memory(devices)
        groups = self.dispatcher.fleet.free_memory(message.bytes, devices, now)
        log.info("Freed for %s: %s.", session.name, ", ".join(group.name for group in groups) or "nothing")
        self.dispatcher.departures.add(Departure(session.peer, message, groups, before))

    def _memory(self, named: Collection[str]) -> tuple[m.MemoryStatus, ...]:
        """Of devices, in the daemon's own order."""
        return self.dispatcher.departures.memory(name for name in self.devices if name in named)

    # --------------------------------------------------------------------------------------------- runs

    def _run(self, session: Session, number: int, *, anybody: bool = False) -> Run:
        run = self.dispatcher.runs.get(number)
        if run is None or (run.peer != session.peer and not anybody):
            raise XditError(
                Code.NO_SUCH_RUN, f"This connection has no run {number}; it has ended, or never was."
            )
        return run

    def _check_room(self, run: Run, key: str, frames: Sequence[Any]) -> None:
        """What a run was given is kept until it ends: refuses more of it than a client may have kept."""
        if key not in run.conditioning and len(run.conditioning) >= MAX_CONDITIONINGS:
            raise XditError(
                Code.BAD_VALUE,
                f"Run {run.id} has {MAX_CONDITIONINGS} conditionings, which is the limit; reuse a key.",
            )
        mine = self.dispatcher.runs.of(run.peer)
        kept = [part for other in mine for _, parts in other.conditioning.values() for part in parts]
        total = sum(part.buffer.nbytes for part in (*kept, *frames))
        if frames and total > self.frame_bytes_per_client:
            raise XditError(
                Code.ARENA_EXHAUSTED,
                f"The conditionings of this connection come to {total} bytes, over the limit of "
                f"{self.frame_bytes_per_client}; close a run, or raise arena.per_client_bytes.",
            )

    def _drained(self) -> None:
        """No run is left. Whoever drains is answered, and the daemon stopped once: a second time would be in a hurry."""
        drained, self._draining = self._draining, []
        for peer, message in drained:
            self.clients.answer(peer, m.Drained(re=message.id))
        if any(message.stop for _, message in drained):
            self.stop()


def _is_meant(message: m.Unload | m.Sleep, group: Group) -> bool:
    if message.group:
        return group.name == message.group
    wanted = message.model
    return (
        wanted is not None and wanted.name == group.ref.name and _today(wanted.kind) == _today(group.ref.kind)
    )


def _today(kind: str) -> str:
    """A kind by its name of today, as the catalog finds a file under either; the echo's is its own."""
    return ALIASES.get(kind, kind)


def _fit(answer: m.ModelList) -> m.ModelList:
    """Cuts a long list to what a header holds, and says how many are missing."""
    models, skipped, more = list(answer.models), list(answer.skipped), 0
    while len(msgspec.msgpack.encode(answer)) > MAX_HEADER - 1024:
        kept = skipped or models
        cut = max(1, len(kept) // 4)
        del kept[-cut:]
        more += cut
        answer = m.ModelList(
            re=answer.re, models=tuple(models), skipped=tuple(skipped), roots=answer.roots, more=more
        )
    return answer


def _told(match: m.LoraMatch) -> str:
    """A LoRA in a line of the log."""
    text = f", {match.text} of text encoders left out" if match.text else ""
    return f"With {match.name} × {match.strength:g}: {match.matched} of {match.modules} modules{text}."
