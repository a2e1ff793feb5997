"""What Prometheus is told: counted as it happens, and read from a status report when somebody scrapes.

The event loop counts, and never waits: a scrape is served by threads of its own, which ask the loop for a report and
wait for it. prometheus-client comes with `xditd[daemon]` and is needed only where a port is configured.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from msgspec import Struct, structs

from xditd.daemon import live_figures
from xditd.daemon.config import Metrics as Settings
from xditd.daemon.groups import Group
from xditd.daemon.runs import Work
from xditd.daemon.scrape import Scrape
from xditd.daemon.session import places
from xditd.protocol import messages as m
from xditd.protocol.errors import Code, XditError
from xditd.protocol.tensors import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
"""Seconds: from an echo to a first step that compiles."""

WORKS = ("denoise", "sample", "decode", "encode", "encode_text")
"""Kinds of turns that are there from the beginning, at 0."""

PATIENCE = 5.0
"""Seconds that a scrape waits for the event loop."""

FRESH = 0.25
"""Seconds for which a report is good: however many scrape, the loop makes four in a second."""

CLOSED = "closed"
"""The outcome of a run that its client closed."""

_CODES = frozenset(code.value for code in Code)


class Metrics:
    """All counters, and the door where they are read."""

    def __init__(self, settings: Settings) -> None:
        """
        Raises:
            XditError: `bad_config` where prometheus-client is not installed.
        """
        try:
            import prometheus_client as prometheus
        except ImportError as error:
            raise XditError(
                Code.BAD_CONFIG,
                "metrics.port is set, but prometheus-client is not installed: pip install 'xditd[daemon]', or leave "
                "the port at 0.",
            ) from error
        prometheus.disable_created_metrics()
        self._settings = settings
        self.registry = registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)

        def counter(name: str, what: str, *labels: str) -> Any:
            return prometheus.Counter(f"xditd_{name}", what, labels, registry=registry)

        self._ended = counter("runs_ended", "Runs that have ended, by outcome: closed, or a code.", "outcome")
        self._failures = counter("failures", "Requests that were answered with failed, by code.", "code")
        self._group_failures = counter("group_failures", "Groups that failed, by code.", "code")
        self._restarts = counter("group_restarts", "Groups that were started again after a failure.")
        self._rests = {
            "asleep": counter("group_sleeps", "Times that a group went to sleep in host memory."),
            "waking": counter("group_wakes", "Times that one was woken."),
        }
        self._bytes = counter(
            "handoff_bytes",
            "Bytes of tensors from and to clients, by direction (in, out) and way (memory, frames).",
            "direction",
            "way",
        )
        self._steps = prometheus.Histogram(
            "xditd_step_seconds",
            "Seconds that the ranks took for a turn: a step, or all of a decode or encode.",
            ["work"],
            registry=registry,
            buckets=BUCKETS,
        )
        # What is known to come is there at 0: a rate over a series that begins with its first event misses that one.
        for outcome in (CLOSED, Code.RUN_CANCELLED.value, Code.RANK_LOST.value, Code.RUN_IDLE.value):
            self._ended.labels(outcome)
        for code in (Code.RANK_LOST, Code.RANK_FAILED, Code.LOAD_FAILED, Code.DEADLINE_EXCEEDED):
            self._group_failures.labels(code.value)
        for work in WORKS:
            self._steps.labels(work)
        self._moved = {
            (direction, way): self._bytes.labels(direction, way)
            for direction in ("in", "out")
            for way in ("memory", "frames")
        }
        self._scrape: Scrape | None = None

    # --------------------------------------------------------------------------------- from the event loop

    def run_ended(self, code: str) -> None:
        self._ended.labels(_known(code) if code else CLOSED).inc()

    def group(self, group: Group) -> None:
        """A group has come to another state."""
        if group.state == "failed":
            self._group_failures.labels(_known(group.code)).inc()
        elif group.state == "starting" and group.generation > 1:
            self._restarts.inc()
        elif group.state in self._rests:
            self._rests[group.state].inc()

    def turn(self, work: Work, seconds: float) -> None:
        self._steps.labels(work.__struct_config__.tag).observe(seconds)

    def asked(self, message: Struct) -> None:
        """A request has come and names its tensors."""
        for _, tensor, is_output in places(message):
            if not is_output:
                self._count("in", tensor)

    def answered(self, reply: Struct) -> None:
        """A reply or event goes out."""
        if isinstance(reply, m.Failed):
            self._failures.labels(_known(reply.code)).inc()
            return
        for tensor in _tensors(reply):
            self._count("out", tensor)

    def _count(self, direction: str, tensor: Tensor) -> None:
        way = "memory" if tensor.frame is None else "frames"
        self._moved[direction, way].inc(tensor.nbytes)

    # ------------------------------------------------------------------------------------------ the door

    def serve(self, report: Callable[[], m.StatusReport]) -> None:
        """Listens, on the running event loop's behalf.

        Args:
            report: what the daemon is now; called in the event loop.

        Raises:
            XditError: `bad_config` where the address cannot be listened on.
        """
        self.registry.register(_Live(report, asyncio.get_running_loop()))
        self._scrape = Scrape(self._settings.address, self._settings.port, self.registry)
        self._scrape.start()

    def close(self) -> None:
        if self._scrape is not None:
            self._scrape.close()


class _Live:
    """Reads a report from the event loop, from any other thread."""

    def __init__(self, report: Callable[[], m.StatusReport], loop: asyncio.AbstractEventLoop) -> None:
        self._report = report
        self._loop = loop
        self._lock = threading.Lock()
        self._last: m.StatusReport | None = None
        self._took = 0.0
        self._asked = float("-inf")

    def describe(self) -> Iterable[Any]:
        return live_figures.families(None, 0.0)

    def collect(self) -> Iterator[Any]:
        with self._lock:
            if self._last is None or time.monotonic() - self._asked > FRESH:
                self._asked = time.monotonic()
                self._last = self._ask()
                self._took = time.monotonic() - self._asked
            report, took = self._last, self._took
        yield from live_figures.families(report, took)

    def _ask(self) -> m.StatusReport | None:
        """None where the loop hangs: the counters are told nevertheless."""
        answer: Future[m.StatusReport] = Future()

        def look() -> None:
            try:
                answer.set_result(self._report())
            except BaseException as error:
                answer.set_exception(error)
                raise

        try:
            self._loop.call_soon_threadsafe(look)
            return answer.result(PATIENCE)
        except Exception:  # it hangs, is closed, or could not make a report, which is in its own log
            return None


def _known(code: str) -> str:
    """Labels are bounded: a code that nobody has listed is another."""
    return code if code in _CODES else "other"


def _tensors(reply: Struct) -> Iterator[Tensor]:
    for value in structs.astuple(reply):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from (one for one in value if isinstance(one, Tensor))
