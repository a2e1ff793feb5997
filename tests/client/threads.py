"""Work in other threads. Daemon threads and no pool: one that waits for ever fails its test, and not the whole run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


def later(work: Callable[..., Any], *args: Any, **options: Any) -> Future[Any]:
    """Starts the work in a thread of its own."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            result = work(*args, **options)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, daemon=True).start()
    return future
