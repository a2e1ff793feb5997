"""Makes demo.svg: what `xditctl demo` shows in a terminal.

.venv/bin/python docs/pictures/demo.py
"""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS = 100
ERASED = re.compile(r"(?:\x1b\[\?25[lh]|\r|\x1b\[2K|\x1b\[1A)+")


def main() -> None:
    ours, theirs = pty.openpty()
    demo = subprocess.Popen(
        [sys.executable, "-m", "xditd.cli.xditctl", "demo", "-o", "xditd-demo.png"],
        stdout=theirs,
        stderr=subprocess.DEVNULL,  # the progress bars, which are gone at the end
        env={**os.environ, "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"},
    )
    os.close(theirs)
    said = b""
    while True:
        try:
            more = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not more:
            break
        said += more
    if demo.wait():
        raise SystemExit(said.decode())
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text("$ make demo", style="bold"))
    console.print(Text.from_ansi(ERASED.sub("\n", said.decode().replace("\r\n", "\n"))))
    path = Path(__file__).with_name("demo.svg")
    path.write_text(console.export_svg(title="make demo", unique_id="xditd-demo"))
    print(path)


if __name__ == "__main__":
    main()
