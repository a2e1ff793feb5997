"""A client of one daemon: what a program holds. It knows requests and answers, no sockets and no slots."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import PurePath
from types import TracebackType
from typing import Any, Union

import zmq
from msgspec import Struct

from xditd.client.connection import Connection, Hear
from xditd.client.degraded import Degraded, tell
from xditd.client.request import anew
from xditd.client.run import Interrupt, Run, forked
from xditd.client.search import connect
from xditd.client.values import T
from xditd.protocol import messages as m
from xditd.protocol.errors import Code, XditError
from xditd.protocol.plans import LoraRef

OnEvent = Callable[[Union[m.Queued, m.Rebound, m.Progress, Degraded]], None]

Lora = Union[LoraRef, str, tuple[str, float]]
"""A LoRA as a program names it."""

_WATCHED = 64
"""Events after which a watch asks on."""

_GONE = 60.0
"""Seconds to wait for groups to be gone: they end with the turn that they are in."""

_CLOSED = XditError(Code.DAEMON_LOST, "This client was closed; make a new Client.")


class Client:
    """A connection to a daemon that outlives the daemon: after a restart the next request connects anew.

    Blocking; every method may be called from any thread. A context manager.

    Every method raises XditError: what the daemon refuses, with its code; `daemon_lost` if the daemon goes while the
    request is under way; `daemon_not_found` if none can be found again; `timeout`.

    Args:
        endpoint: `ipc:///path` or `tcp://host:port`; None looks at `XDITD_ENDPOINT`, the user's socket and the
            system's.
        name: for people who read `xditctl status`: "ComfyUI 0.3.64"; "" is the program's file name.
        shared_memory: with False, tensors travel as frames, as they do over tcp. A program that sends no tensors
            saves the daemon an arena with it.
        timeout: seconds to wait for a daemon, and for answers that need no model. 0 tries every place once.

    Raises:
        XditError: `daemon_not_found` naming every endpoint tried and the cure, `unsupported_version`,
            `arena_exhausted` where the daemon has no memory for another client, `bad_value` for an endpoint that is
            none.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        *,
        name: str = "",
        shared_memory: bool = True,
        timeout: float = 30.0,
    ) -> None:
        self._endpoint = endpoint
        self._name = name or PurePath(sys.argv[0] if sys.argv else "").name
        self._shared_memory = shared_memory
        self._timeout = timeout
        self._pid = os.getpid()
        self._context: zmq.Context[Any] = zmq.Context()
        self._connecting = threading.Lock()
        self._closed = False
        self._connection: Connection | None = None
        try:
            self._connected()
        except BaseException:
            self._context.term()
            raise

    # --------------------------------------------------------------------------------------------- the daemon it has

    @property
    def endpoint(self) -> str:
        """Where the daemon listens that was found."""
        return self._connected().endpoint.address

    @property
    def epoch(self) -> str:
        """Another one means that the daemon was restarted."""
        return self._connected().welcome.epoch

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What the daemon can do beyond the protocol's version."""
        return self._connected().welcome.capabilities

    @property
    def limits(self) -> m.Limits:
        """What the daemon accepts."""
        return self._connected().welcome.limits

    @property
    def daemon_version(self) -> str:
        """The daemon's own version."""
        return self._connected().welcome.daemon

    # ------------------------------------------------------------------------------------------------------ requests

    def status(self) -> m.StatusReport:
        """The daemon, its devices, groups, runs and arenas."""
        return self._ask(m.Status, {}, self._timeout)

    def models(self, kind: str = "") -> m.ModelList:
        """The files that the daemon can load, of a kind ("" is every kind)."""
        return self._ask(m.Models, {"kind": kind}, self._timeout)

    def explain(
        self, model: m.ModelRef | str, plan: m.PlanRequest | None = None, size: tuple[int, int] = (0, 0)
    ) -> m.Explained:
        """How the model would run, and why not otherwise; nothing is loaded. `size`: width and height in pixels."""
        width, height = size
        fields = {"model": _model(model), "plan": plan or m.PlanRequest(), "width": width, "height": height}
        return self._ask(m.Explain, fields, self._timeout)

    def load(
        self,
        model: m.ModelRef | str,
        plan: m.PlanRequest | None = None,
        *,
        lora: Sequence[Lora] = (),
        on_event: OnEvent | None = None,
        interrupt: Interrupt | None = None,
        timeout: float | None = None,
    ) -> m.Loaded:
        """Has the model ready under the plan; returns when it is.

        Args:
            model: "kind/name" or a ModelRef.
            plan: None leaves it to the planner.
            lora: that runs will have: the daemon looks whether they fit, and merges nothing.
            on_event: hears `Queued` with the phase, in this thread.
            interrupt: called every 20 ms; what it raises ends the wait, not the loading.
            timeout: seconds; None waits for as long as it takes.
        """
        fields = {"model": _model(model), "plan": plan or m.PlanRequest(), "lora": _loras(lora)}
        return self._ask(m.Load, fields, timeout, on_event, interrupt)

    def unload(
        self, model: m.ModelRef | str | None = None, *, group: str = "", force: bool = False
    ) -> m.Unloaded:
        """Ends the groups of a model, or the one named; those with runs only by force. Returns when they are gone."""
        fields = {"model": None if model is None else _model(model), "group": group, "force": force}
        return self._ask(m.Unload, fields, max(self._timeout, _GONE))

    def sleep(self, model: m.ModelRef | str | None = None, *, group: str = "") -> m.Slept:
        """Has the groups of a model sleep in the host's memory, or the one named, until the next run or `load`.

        Raises:
            XditError: `group_busy` where runs use one; `out_of_memory` where the host has no room.
        """
        fields = {"model": None if model is None else _model(model), "group": group}
        return self._ask(m.Sleep, fields, max(self._timeout, _GONE))

    def free_memory(self, nbytes: int = 0, devices: Sequence[str] = ()) -> m.MemoryFreed:
        """Ends models that no run uses, until each device has so many bytes back. Returns when they are gone.

        Args:
            nbytes: 0 is all that can be given back.
            devices: by the names of `status`; none is all.
        """
        fields = {"bytes": nbytes, "devices": tuple(devices)}
        return self._ask(m.FreeMemory, fields, max(self._timeout, _GONE))

    def open_run(
        self,
        model: m.ModelRef | str,
        plan: m.PlanRequest | None = None,
        *,
        label: str = "",
        priority: int = 0,
        lora: Sequence[Lora] = (),
        on_event: OnEvent | None = None,
        interrupt: Interrupt | None = None,
        timeout: float | None = None,
    ) -> Run:
        """Queues a run and returns it when it is bound to a ready group; loads the model where it is not.

        Args:
            model: "kind/name" or a ModelRef.
            plan: None leaves it to the planner.
            label: for people who read `xditctl status`.
            priority: −2 to 2; each step is worth twice the share of turns, and a minute of waiting.
            lora: merged into the model's weights for this run, in this order: (name, strength), a name, or a LoraRef.
            on_event: hears `Queued` now and the run's `Rebound` and `Progress` later, in the thread that waits.
            interrupt: called every 20 ms; what it raises takes the run out of the queue and is passed on.
            timeout: seconds; None waits for as long as it takes.
        """
        fields = {
            "model": _model(model),
            "plan": plan or m.PlanRequest(),
            "label": label,
            "priority": priority,
            "lora": _loras(lora),
        }
        queued = 0

        def hear(event: Any, frames: list[Any]) -> None:
            nonlocal queued
            if isinstance(event, m.Queued) and event.run is not None:
                queued = event.run
            if on_event is not None:
                on_event(event)

        def late(connection: Connection, answer: Any) -> None:
            if isinstance(answer, m.RunOpened):
                connection.tell(m.Cancel, {"run": answer.run})

        def left(connection: Connection) -> None:
            if queued:
                connection.tell(m.Cancel, {"run": queued})

        connection, opened = self._asked(m.OpenRun, fields, timeout, hear, interrupt, late, left)
        return Run(connection, opened, on_event, self._timeout)

    def decode(
        self,
        vae_model: m.ModelRef | str,
        latent: T,
        plan: m.PlanRequest | None = None,
        *,
        clamp: bool = True,
        tile: int | None = None,
        on_event: OnEvent | None = None,
        interrupt: Interrupt | None = None,
        timeout: float | None = None,
    ) -> T:
        """Latent [B, C, h, w], unscaled, to image [B, H, W, 3] float32 in 0..1: a run of one turn.

        For `clamp` and `tile` see `Run.decode`. What was degraded is told to `on_event` as `Degraded`; where there is none,
        it is a `DegradedWarning`. So it is with `encode` and `encode_text`.
        """
        with self._one_turn(vae_model, plan, "decode", on_event, interrupt, timeout) as run:
            return run.decode(latent, clamp=clamp, tile=tile, interrupt=interrupt)

    def encode(
        self,
        vae_model: m.ModelRef | str,
        image: T,
        plan: m.PlanRequest | None = None,
        *,
        tile: int | None = None,
        on_event: OnEvent | None = None,
        interrupt: Interrupt | None = None,
        timeout: float | None = None,
    ) -> T:
        """Image [B, H, W, 3] in 0..1 to latent [B, C, h, w] float32, unscaled: a run of one turn. For `tile` see `Run.decode`."""
        with self._one_turn(vae_model, plan, "encode", on_event, interrupt, timeout) as run:
            return run.encode(image, tile=tile, interrupt=interrupt)

    def encode_text(
        self,
        text_model: m.ModelRef | str,
        tokens: T,
        plan: m.PlanRequest | None = None,
        *,
        vectors: T | None = None,
        mask: T | None = None,
        layer: int | None = None,
        final_norm: bool = True,
        pooled: str = "none",
        on_event: OnEvent | None = None,
        interrupt: Interrupt | None = None,
        timeout: float | None = None,
    ) -> tuple[T, T | None]:
        """Tokens [B, n] to hidden states and the pooled output, as `Run.encode_text`: a run of one turn."""
        with self._one_turn(text_model, plan, "encode text", on_event, interrupt, timeout) as run:
            return run.encode_text(
                tokens,
                vectors=vectors,
                mask=mask,
                layer=layer,
                final_norm=final_norm,
                pooled=pooled,
                interrupt=interrupt,
            )

    def cancel(self, run_id: int) -> None:
        """Ends a run, also another client's; returns when it has ended: after the step it is in."""
        self._ask(m.Cancel, {"run": run_id}, self._timeout)

    def drain(self, stop: bool = False, timeout: float | None = None) -> None:
        """Has the daemon take no new runs; returns when the open ones have ended. With `stop` it then ends."""
        self._ask(m.Drain, {"stop": stop}, timeout)

    def watch(
        self,
        on_event: Callable[[m.Happened], None],
        *,
        after: int | None = None,
        count: int | None = None,
        interrupt: Interrupt | None = None,
    ) -> int:
        """Hears what happens, in this thread; what `on_event` raises ends it and is passed on.

        Args:
            after: number of the last event that is known; 0 hears all that the daemon has kept, None what comes.
            count: events to hear; None goes on for as long as the daemon lives.
            interrupt: called every 20 ms; what it raises ends it.

        Returns:
            The number of the last event that was heard, for another `after`.
        """
        left = count
        while left is None or left > 0:
            asked = _WATCHED if left is None else min(left, _WATCHED)
            heard = 0

            def hear(event: Any) -> None:
                nonlocal heard
                heard += 1
                on_event(event)

            answer = self._ask(m.Watch, {"after": after, "count": asked}, None, hear, interrupt)
            after = answer.last
            if heard < asked:  # the daemon stops, or another thread watches now
                break
            if left is not None:
                left -= heard
        return after or 0

    def close(self) -> None:
        """Ends the connection; the daemon ends its runs and frees its arena. Results that live stay readable."""
        if self._pid != os.getpid():  # the parent's: its sockets are not ours to close
            return
        with self._connecting:
            if self._closed:
                return
            self._closed = True
            if self._connection is not None:
                self._connection.say_goodbye()
                self._connection.close(anew(_CLOSED))
        self._context.term()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -------------------------------------------------------------------------------------------------------- inside

    def _connected(self, interrupt: Interrupt | None = None) -> Connection:
        """The connection, made anew where the last one is over."""
        if self._pid != os.getpid():
            raise forked(self._pid)
        connection = self._connection
        if connection is not None and connection.alive:
            return connection
        with self._connecting:
            if self._closed:
                raise anew(_CLOSED)
            if self._connection is None or not self._connection.alive:
                self._connection = connect(
                    self._context,
                    self._endpoint,
                    name=self._name,
                    shared_memory=self._shared_memory,
                    timeout=self._timeout,
                    interrupt=interrupt,
                )
            return self._connection

    @contextmanager
    def _one_turn(
        self,
        model: m.ModelRef | str,
        plan: m.PlanRequest | None,
        label: str,
        on_event: OnEvent | None,
        interrupt: Interrupt | None,
        timeout: float | None,
    ) -> Iterator[Run]:
        with self.open_run(
            model, plan, label=label, on_event=on_event, interrupt=interrupt, timeout=timeout
        ) as run:
            yield run
        tell(run.model.name, run.degraded, on_event, depth=4)  # this, contextlib's, the method, who called it

    def _ask(
        self,
        kind: type[Struct],
        fields: dict[str, Any],
        timeout: float | None,
        on_event: OnEvent | None = None,
        interrupt: Interrupt | None = None,
    ) -> Any:
        hear = None if on_event is None else lambda event, frames: on_event(event)
        return self._asked(kind, fields, timeout, hear, interrupt)[1]

    def _asked(
        self,
        kind: type[Struct],
        fields: dict[str, Any],
        timeout: float | None,
        hear: Hear | None,
        interrupt: Interrupt | None,
        late: Callable[[Connection, Any], None] | None = None,
        left: Callable[[Connection], None] | None = None,
    ) -> tuple[Connection, Any]:
        """Asks on the connection there is; once more on another where the daemon had forgotten this client.

        A daemon forgets clients without shared memory that are quiet for long: it has no other way to see them go.
        Of a request that is abandoned, `left` is called now and `late` with the answer that comes for it.
        """
        again = True
        while True:
            connection = self._connected(interrupt)
            request = connection.begin(kind, fields)
            heard = None if late is None else partial(late, connection)
            try:
                answer, _ = connection.finish(
                    request, hear=hear, interrupt=interrupt, timeout=timeout, late=heard
                )
            except BaseException:
                if request.abandoned and left is not None:
                    left(connection)
                if not (request.unheard and again):
                    raise
                again = False
            else:
                return connection, answer


def _model(model: m.ModelRef | str) -> m.ModelRef:
    if isinstance(model, m.ModelRef):
        return model
    kind, slash, name = model.partition("/")
    if not slash or not kind or not name:
        raise XditError(
            Code.BAD_VALUE,
            f"{model!r} names no model: write kind/name, as in diffusion_models/flux1-dev.safetensors.",
        )
    return m.ModelRef(kind=kind, name=name)


def _loras(given: Sequence[Lora]) -> tuple[LoraRef, ...]:
    refs = []
    for each in given:
        if isinstance(each, LoraRef):
            refs.append(each)
        else:
            name, strength = (each, 1.0) if isinstance(each, str) else each
            refs.append(LoraRef(name=name, strength=float(strength)))
    return tuple(refs)
