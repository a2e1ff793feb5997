"""Lines on a node: ⏳ while it waits, ✅ done, ⚠️ done in a lesser way, ❌ refused."""

from __future__ import annotations

import logging
import sys

log = logging.getLogger("xditd.nodes")


def say(text: str) -> None:
    """Shows a line on the node that is being executed; in the log where there is none."""
    from comfy_execution.utils import get_executing_context

    # Looked up, not imported: without a server, as in a script, its import has effects of its own.
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    context = get_executing_context()
    if context is None or server is None:
        log.info("%s", text)
    else:
        server.send_progress_text(text, context.node_id)
