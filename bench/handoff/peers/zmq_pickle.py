"""ZeroMQ with pickled tensors: DEALER to ROUTER to DEALER, the daemon forwards frames without a look at them.

A peer of the benchmark alone: xditd unpickles nothing.
"""

from __future__ import annotations

import pickle
import tempfile

import torch
import zmq

from bench.handoff import child
from bench.handoff.echo import Echo
from bench.handoff.peers import EVERY


class ZmqPickle:
    name = "zmq-pickle"
    says = "ZeroMQ over ipc://, tensors pickled with protocol 5, copy=False frames"
    payloads = EVERY

    def start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bench-handoff-")
        front, back = (f"ipc://{self._folder.name}/{end}" for end in ("front", "back"))
        self._children = [
            child.start(__name__, "daemon", args=(front, back)),
            child.start(__name__, "rank", args=(back,)),
        ]
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(front)
        self.once("S", {"x": torch.zeros(1)})

    def prepare(self, payload: str) -> None:
        """Nothing is kept between jobs."""

    def once(self, payload: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        self._socket.send(pickle.dumps(inputs, protocol=5), copy=False)
        return pickle.loads(self._socket.recv(copy=False).buffer)

    def stop(self) -> None:
        self._socket.close()
        child.end(self._children)
        self._folder.cleanup()


def daemon(front: str, back: str) -> None:
    """Forwards between the one client and the one rank."""
    context = zmq.Context()
    ranks, clients = context.socket(zmq.ROUTER), context.socket(zmq.ROUTER)
    ranks.bind(back)
    rank_name, _ = ranks.recv_multipart()
    clients.bind(front)
    while True:
        client_name, body = clients.recv_multipart(copy=False)
        ranks.send_multipart([rank_name, body], copy=False)
        _, answer = ranks.recv_multipart(copy=False)
        clients.send_multipart([client_name, answer], copy=False)


def rank(back: str) -> None:
    torch.set_num_threads(1)
    echo, socket = Echo(), zmq.Context().socket(zmq.DEALER)
    socket.connect(back)
    socket.send(b"here")
    while True:
        inputs = pickle.loads(socket.recv(copy=False).buffer)
        socket.send(pickle.dumps(echo(inputs), protocol=5), copy=False)
