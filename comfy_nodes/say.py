"""Lines on a node: ⏳ while it waits, ✅ done, ⚠️ done in a lesser way, ❌ refused."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

from xditd.protocol.errors import XditError

log = logging.getLogger("xditd.nodes")


def running_server() -> Any:
    """ComfyUI's server, or None. Looked up, not imported: without one, as in a script, that has effects of its own."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def say(text: str) -> None:
    """Shows a line on the node that is being executed; in the log where there is none."""
    from comfy_execution.utils import get_executing_context

    server, context = running_server(), get_executing_context()
    if context is None or server is None:
        log.info("%s", text)
    else:
        server.send_progress_text(text, context.node_id)


@contextlib.contextmanager
def telling_refusals() -> Iterator[None]:
    """Shows a refusal on the node as well as in ComfyUI's own dialogue."""
    try:
        yield
    except XditError as error:
        say(f"❌ {error.message}")
        raise
