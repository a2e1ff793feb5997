"""What a bar shows of a model that is loaded: bytes on a terminal, and no line for each in a pipe."""

from __future__ import annotations

import io

from rich.console import Console

from xditd.cli.bars import PhaseBar
from xditd.protocol.messages import Queued


def shown(terminal: bool) -> str:
    said = io.StringIO()
    with PhaseBar(Console(file=said, force_terminal=terminal, width=160), "vae/ae.safetensors") as bar:
        for loaded in (0, 3 << 30, 6 << 30):
            bar.on_event(Queued(re=1, run=None, position=0, phase="loading", loaded=loaded, total=6 << 30))
            if bar._progress is not None:
                bar._progress.refresh()
    return said.getvalue()


def test_a_terminal_sees_the_bytes() -> None:
    assert "3.0 GiB of 6.0 GiB" in shown(terminal=True)


def test_a_pipe_sees_one_line() -> None:
    assert shown(terminal=False) == "   vae/ae.safetensors: ranks load the model\n"
