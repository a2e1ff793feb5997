"""ComfyUI nodes of xditd: each the multi-GPU twin of a stock one. Imports ComfyUI when ComfyUI asks for the nodes.

A clone of the repository, or a link to this folder, brings its own `xditd`; an installed one is left alone.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

WEB_DIRECTORY = "./web"

if importlib.util.find_spec("xditd") is None:
    sys.path.append(str(Path(__file__).resolve().parents[1]))


async def comfy_entrypoint() -> Any:
    """What ComfyUI calls to get the nodes."""
    from .pack import Pack

    return Pack()
