"""HTTP with JSON and base64, as a REST service would do it: keep-alive connections, no Nagle delay.

The daemon is a ThreadingHTTPServer that relays bodies to the rank's own server without parsing them.
"""

from __future__ import annotations

import base64
import http.client
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from bench.handoff import child
from bench.handoff.echo import Echo
from bench.handoff.peers import EVERY


class HttpJson:
    name = "http"
    says = "HTTP/1.1 keep-alive on the loopback, JSON, tensors in base64"
    payloads = EVERY

    def start(self) -> None:
        front, back = _listen(), _listen()
        self._connection = http.client.HTTPConnection("127.0.0.1", front.getsockname()[1])
        self._children = [
            child.start(__name__, "rank", back.fileno()),
            child.start(__name__, "daemon", front.fileno(), args=(str(back.getsockname()[1]),)),
        ]
        front.close()
        back.close()
        self.once("S", {"x": torch.zeros(1)})

    def prepare(self, payload: str) -> None:
        """Nothing is kept between jobs."""

    def once(self, payload: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        body = json.dumps({name: to_json(tensor) for name, tensor in inputs.items()}).encode()
        self._connection.request("POST", "/denoise", body, {"Content-Type": "application/json"})
        return from_json(json.loads(self._connection.getresponse().read()))

    def stop(self) -> None:
        self._connection.close()
        child.end(self._children)


def to_json(tensor: torch.Tensor) -> dict[str, Any]:
    data = base64.b64encode(tensor.contiguous().view(-1).view(torch.uint8).numpy().data).decode("ascii")
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "data": data}


def from_json(tensor: dict[str, Any]) -> torch.Tensor:
    data = bytearray(base64.b64decode(tensor["data"]))
    return torch.frombuffer(data, dtype=getattr(torch, tensor["dtype"])).view(tensor["shape"])


def _listen() -> socket.socket:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.set_inheritable(True)
    return listener


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # headers and body leave in one write
    answer: Any  # body to body

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = type(self).answer(body)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass  # a line per request on stderr would be timed too


def _serve(listener: int, answer: Any) -> None:
    handler = type("Handler", (_Handler,), {"answer": staticmethod(answer)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler, bind_and_activate=False)
    server.socket.close()
    server.socket = socket.socket(fileno=listener)
    server.serve_forever()


def daemon(front: int, rank_port: int) -> None:
    """Relays; each of its threads keeps one connection to the rank."""
    local = threading.local()

    def forward(body: bytes) -> bytes:
        if not hasattr(local, "connection"):
            local.connection = http.client.HTTPConnection("127.0.0.1", rank_port)
        local.connection.request("POST", "/denoise", body, {"Content-Type": "application/json"})
        return local.connection.getresponse().read()

    _serve(front, forward)


def rank(back: int) -> None:
    torch.set_num_threads(1)
    echo = Echo()

    def answer(body: bytes) -> bytes:
        inputs = {name: from_json(tensor) for name, tensor in json.loads(body).items()}
        return json.dumps(to_json(echo(inputs))).encode()

    _serve(back, answer)
