# SPDX-License-Identifier: GPL-3.0-or-later
"""A clone of this repository in ComfyUI's custom_nodes: the nodes of comfy_nodes/, which bring their own xditd.

Nothing else imports this file. Beside it ComfyUI looks for `locales` and `example_workflows`.
"""

from __future__ import annotations

from typing import Any

WEB_DIRECTORY = "./comfy_nodes/web"


async def comfy_entrypoint() -> Any:
    """What ComfyUI calls to get the nodes."""
    from .comfy_nodes import comfy_entrypoint as entrypoint

    return await entrypoint()
