"""ComfyUI's "free memory" reaches the daemon: what this ComfyUI had it load, and no run uses, is unloaded there too.

ComfyUI tells node packs nothing of it; so its request for that is listened to, and passed on to whom it is for. Its
function that unloads all models is not the place: --disable-smart-memory calls that after every prompt.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelRef

from . import daemon
from .dispatcher import Dispatcher

log = logging.getLogger("xditd.nodes")

PATHS = ("/free", "/api/free")

_used: set[tuple[str, str, str]] = set()
"""Endpoint, kind and name of the models that this process had loaded."""


def used(dispatcher: Dispatcher) -> None:
    """Notes a model that this process had the daemon load."""
    _used.add((dispatcher.endpoint, dispatcher.model.kind, dispatcher.model.name))


def free() -> None:
    """Unloads what was noted. What somebody uses stays, and whoever needs a model later has it loaded again."""
    while _used:
        endpoint, kind, name = _used.pop()
        try:
            daemon.client(endpoint).unload(ModelRef(kind=kind, name=name))
        except XditError as error:
            if error.code not in (Code.NO_SUCH_GROUP, Code.GROUP_BUSY):
                log.warning("%s was not unloaded: %s", name, error.message)


def listen(server: Any) -> None:
    """Has a PromptServer's requests to unload models heard. Before it starts."""
    from aiohttp import web

    @web.middleware
    async def hear(request: Any, handler: Any) -> Any:
        response = await handler(request)
        if request.method == "POST" and request.path in PATHS and (await request.json()).get("unload_models"):
            await asyncio.to_thread(free)
        return response

    server.app.middlewares.append(hear)
