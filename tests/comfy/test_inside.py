"""The tests that run in ComfyUI's own environment, file by file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.comfy.conftest import INSIDE

FOLDER = Path(__file__).parent / "inside"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("test_*.py")))
@pytest.mark.timeout(900)
def test_in_comfyui(checkout: Path, python: str, name: str) -> None:
    ended = subprocess.run(
        [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / name)],
        cwd=ROOT,
        env={
            **os.environ,
            INSIDE: "1",
            "COMFYUI_PATH": str(checkout),
            "PYTHONPATH": str(ROOT),
            "XDITD_PYTHON": sys.executable,
        },
        capture_output=True,
        text=True,
    )
    print(ended.stdout[-4000:])
    assert ended.returncode == 0, ended.stdout[-12000:] + ended.stderr[-4000:]
