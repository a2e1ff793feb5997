"""The loop of a rank: take an order, do it, answer. Knows no model, no torch and no socket but the control socket.

An exception in a turn ends that turn, and with it the process where the process or its peers cannot go on. One in
an order that is no turn is owed to its run, and told in place of the run's next turn.
"""

from __future__ import annotations

import time
import traceback
from typing import Any

import zmq
from msgspec import Struct, structs

from xditd.handoff.lane import Lane
from xditd.protocol import orders
from xditd.protocol.codec import encode
from xditd.protocol.errors import Code, XditError
from xditd.rank.answers import Answer, Worker
from xditd.rank.failures import explain, is_refusal, let_go
from xditd.rank.faults import Faults
from xditd.rank.inbox import Inbox


class Loop:
    """Orders in, reports out, one after another.

    Args:
        socket: the DEALER that is connected to the daemon.
        lane: the shortcut for turns, where there is one.
        spec: of this rank.
        worker: that does the orders.
        faults: that a test asked for.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        lane: Lane | None,
        spec: orders.RankSpec,
        worker: Worker,
        faults: Faults,
    ) -> None:
        self._socket = socket
        self._lane = lane
        self._inbox = Inbox(socket, lane)
        self._spec = spec
        self._worker = worker
        self._faults = faults
        self._owed: dict[int, BaseException] = {}  # by run: what its next turn is to raise

    def serve(self) -> int:
        """Serves until told to leave, or until it can not go on.

        Returns:
            The exit code.
        """
        while True:
            # Idle ranks wait here and in no collective: those time out, and block a rank that is to leave.
            order, frames = self._inbox.next()
            if isinstance(order, orders.Leave):
                return 0
            try:
                if isinstance(order, orders.TURNS):
                    self._turn(order, frames)
                elif isinstance(order, orders.RESTS):
                    self._rest(order, frames)
                else:
                    self._do(order, frames)
            except Exception as error:  # the outermost loop: whatever it is, it is told, and decided on
                if not self._goes_on_after(order, error):
                    return 1

    def _turn(self, order: Any, frames: list[Any]) -> None:
        owed = self._owed.pop(order.run, None)
        if owed is not None:
            raise owed
        begun = time.perf_counter()
        self._faults.at_turn()
        answer: Answer = self._do(order, frames)
        if self._spec.rank == 0:
            done = orders.TurnDone(
                order=order.order,
                outputs=answer.outputs,
                seconds=time.perf_counter() - begun,
                preview=answer.preview,
                device_memory=self._worker.device_memory(),
                degraded=answer.degraded,
            )
            if answer.frames or self._lane is None or not self._lane.send(encode(done)):
                report(self._socket, done, answer.frames)

    def _rest(self, order: Any, frames: list[Any]) -> None:
        begun = time.perf_counter()
        if isinstance(order, orders.Wake):
            self._faults.at_wake()
        self._do(order, frames)
        rested = orders.RankRested(
            rank=self._spec.rank,
            asleep=isinstance(order, orders.Sleep),
            seconds=time.perf_counter() - begun,
            device_memory=self._worker.device_memory(),
        )
        report(self._socket, rested)

    def _do(self, order: Any, frames: list[Any]) -> Any:
        handler = self._worker.handlers.get(type(order))
        if handler is None:
            raise XditError(
                Code.NOT_BUILT, f"A {self._spec.part} of {self._spec.family} has no {type(order).__name__}."
            )
        if isinstance(order, orders.ForgetRun):
            self._owed.pop(order.run, None)
        return handler(order, frames)

    def _goes_on_after(self, order: Any, error: Exception) -> bool:
        """Tells of the exception where it is due. Whether this process serves on."""
        told = failed(self._spec.rank, error, getattr(order, "order", None), alive=False)
        told = structs.replace(told, run=getattr(order, "run", None))
        let_go(error)
        # Who knows where weights are that went half of the way?
        # And a file may read otherwise for each rank of a world: one that owes it and one that has it would part.
        torn = isinstance(order, orders.RESTS) or (
            isinstance(order, orders.SetLoras) and self._spec.world > 1
        )
        alive = not torn and (is_refusal(error) or (self._spec.world == 1 and self._worker.usable()))
        if alive and not isinstance(order, orders.TURNS) and hasattr(order, "run"):
            self._owed[order.run] = error
            return True
        if alive and self._spec.rank != 0:
            return True  # every rank raised the same; rank 0 tells
        report(self._socket, structs.replace(told, alive=alive))
        return alive


def failed(rank: int, error: BaseException, order: int | None, alive: bool) -> orders.RankFailed:
    """The report of an exception."""
    code, message = explain(error)
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    return orders.RankFailed(
        rank=rank, order=order, code=code, message=message, traceback=text[-16_000:], alive=alive
    )


def report(socket: zmq.Socket[bytes], message: Struct, frames: Any = ()) -> None:
    """Sends a report. Large frames are not copied: ZeroMQ holds on to them until they are sent."""
    socket.send_multipart([encode(message), *frames], copy=False)
