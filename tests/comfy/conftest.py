"""Where ComfyUI is. Its tests are skipped, and say so, where COMFYUI_PATH names no checkout.

COMFYUI_PATH is a checkout, COMFYUI_PYTHON the python of an environment with its requirements (this one's, if unset).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

INSIDE = "XDITD_INSIDE"
"""Set where the tests run in ComfyUI's environment."""

collect_ignore = [] if INSIDE in os.environ else ["inside"]


@pytest.fixture(scope="session")
def checkout() -> Path:
    path = os.environ.get("COMFYUI_PATH", "")
    if not path or not (Path(path) / "main.py").exists():
        pytest.skip("COMFYUI_PATH names no checkout of ComfyUI")
    return Path(path).resolve()


@pytest.fixture(scope="session")
def python() -> str:
    return os.environ.get("COMFYUI_PYTHON", sys.executable)
