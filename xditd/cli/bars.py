"""Progress: bars on a terminal, a line for each change in a pipe. Knows events, not who sends them."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from xditd.cli import words
from xditd.client import Degraded
from xditd.protocol.messages import Queued, Rebound

PHASES = {
    "waiting": "waiting for a place or for memory",
    "starting": "ranks start",
    "importing": "ranks import torch and xfuser",
    "joining": "ranks join their world",
    "loading": "ranks load the model",
    "waking": "ranks wake the model",
}
"""What a `queued` event's phase means, in the order of their coming."""


class PhaseBar:
    """From being asked for to ready: `on_event` takes the client's events."""

    def __init__(self, console: Console, what: str) -> None:
        self.console = console
        self.what = what
        self._said = ""
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("[dim]{task.fields[phase]}"),
                TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            self._task = self._progress.add_task(
                Text(what).markup, total=len(PHASES), phase="asking the daemon"
            )

    def on_event(self, event: Any) -> None:
        if isinstance(event, Degraded):
            self.console.print(words.degraded(event.reason), style="yellow", markup=False)
        if isinstance(event, Rebound):
            self._say(f"{words.WARNING} run {event.run} moved to group {event.group}: {event.reason}")
        if not isinstance(event, Queued):
            return
        text = PHASES.get(event.phase, event.phase)
        if event.position:
            text += f", {words.plural(event.position, 'run')} before this one"
        if event.estimate:
            text += f", about {words.duration(event.estimate)}"
        if self._progress is not None:
            done: float = list(PHASES).index(event.phase) if event.phase in PHASES else 0
            if event.total:  # on a terminal alone: a line for each would be many
                done += event.loaded / event.total
                text += f", {words.size(event.loaded)} of {words.size(event.total)}"
            self._progress.update(self._task, completed=done, phase=text)
        elif text != self._said:
            self._say(f"   {self.what}: {text}")
            self._said = text

    def _say(self, line: str) -> None:
        self.console.print(line, markup=False)

    def __enter__(self) -> PhaseBar:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()


class StepBar:
    """A sampling loop: `step` is a callback of `Run.sample`."""

    def __init__(self, console: Console, what: str, total: int) -> None:
        self.console = console
        self.what = what
        self.began = time.monotonic()
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("[dim]{task.fields[pace]}"),
                TimeElapsedColumn(),
                console=console,
            )
            self._task = self._progress.add_task(Text(what).markup, total=total, pace="")

    def step(self, step: int, total: int, sigma: float, x0: Any = None) -> None:
        pace = f"{words.duration((time.monotonic() - self.began) / step)} a step, sigma {sigma:.3f}"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, total=total, pace=pace)
            return
        filled = round(step / total * 20)
        bar = "━" * filled + "╌" * (20 - filled)
        self.console.print(f"   {self.what} {bar} {step:>3}/{total}  {pace}", markup=False)

    def __enter__(self) -> StepBar:
        self.began = time.monotonic()
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
