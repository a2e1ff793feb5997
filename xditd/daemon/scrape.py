"""The door for Prometheus: HTTP, in threads of its own, few at a time. It knows a registry, and no daemon."""

from __future__ import annotations

import socket
import socketserver
import threading
from http.server import ThreadingHTTPServer
from typing import Any

from xditd.protocol.errors import Code, XditError

MOST = 8
"""Scrapes at a time; a further one is hung up on."""

QUIET = 5.0
"""Seconds that a client may say nothing in the middle of a request."""


class Scrape:
    """One listening socket."""

    def __init__(self, address: str, port: int, registry: Any) -> None:
        """
        Raises:
            XditError: `bad_config` where the address cannot be listened on.
        """
        from prometheus_client.exposition import MetricsHandler

        handler = type("Handler", (MetricsHandler.factory(registry),), {"timeout": QUIET})
        try:
            self._server = _Server(address, port, handler)
        except OSError as error:
            raise XditError(
                Code.BAD_CONFIG,
                f"Metrics cannot be served on {address} port {port}: {error.strerror or error}; choose another "
                "metrics.port.",
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a client that dawdles does not hold up the daemon's end

    def __init__(self, address: str, port: int, handler: type) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._places = threading.BoundedSemaphore(MOST)
        super().__init__((address, port), handler)

    def server_bind(self) -> None:
        """As its parent's, without asking the resolver for our name, which can take long."""
        socketserver.TCPServer.server_bind(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up in the middle is nobody's error."""
