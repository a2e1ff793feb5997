"""One run of a client: its conditioning, its steps and its end. It knows the messages of a run, no sockets."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from msgspec import Struct

from xditd.client import sampling, text, vae
from xditd.client.connection import Connection, Hear
from xditd.client.parcel import Parcel
from xditd.client.request import Request, anew
from xditd.client.step import Step
from xditd.client.values import T, Times, like, source, times
from xditd.protocol import messages as m
from xditd.protocol.errors import Code, XditError

Interrupt = Callable[[], None]


class Run:
    """A run that is bound to a group. Made by `Client.open_run`; a context manager that closes it.

    Tensors go in as torch tensors, of any device and strides, or as `Buffer`s, and come out as what went in. Results
    are views of shared memory: they cost no copy, and their slot is used again when the last view of a result is
    gone. Clone what must outlive many steps.

    Every method that asks the daemon raises XditError: what the daemon refuses; `daemon_lost` if the daemon goes while
    it is under way and `run_lost` after that; `arena_exhausted` where results that the program holds fill its shared
    memory. `interrupt` is called every 20 ms while waiting; what it raises cancels the run and is passed on.

    Attributes:
        id: its number in this life of the daemon; group: that it is bound to; another one after a `Rebound`.
        plan: how that group runs the model; degraded: why that is less than was asked for, "" where it is not.
        model: what the daemon found the file to be.
        lora: what each of its LoRAs changes of the model.
    """

    def __init__(
        self,
        connection: Connection,
        opened: m.RunOpened,
        on_event: Callable[[Any], None] | None,
        timeout: float,
    ) -> None:
        """
        Args:
            on_event: hears Progress and Rebound.
            timeout: seconds for answers that need no turn.
        """
        self.id = opened.run
        self.group = opened.group
        self.plan, self.degraded = opened.plan, opened.degraded
        self.model = opened.model
        self.lora = opened.lora
        self._connection = connection
        self._on_event = on_event
        self._timeout = timeout
        self._pid = os.getpid()
        self._ended: XditError | None = None
        # Of the conditioning: ranks may read it for as long as the run lives.
        self._kept: dict[str, Parcel] = {}
        self._replaced: list[Parcel] = []  # of conditioning that was put anew since
        self._unheard: list[Request] = []  # of conditioning whose answer was not waited for
        connection.listeners[self.id] = self._over

    # ------------------------------------------------------------------------------------------------ what it does

    def put_conditioning(
        self,
        key: str,
        tensors: Mapping[str, T],
        values: Mapping[str, float] | None = None,
        *,
        wait: bool = True,
    ) -> None:
        """Gives the run a conditioning under a key, once for all its steps.

        Args:
            key: what `denoise` and `sample` call it by, 1 to 128 characters.
            tensors: by the family's names; for Flux "context" [B, L, D] and "pooled" [B, D].
            values: numbers that belong to it, such as "guidance".
            wait: with False it returns when the conditioning is sent, and what the daemon has against it is raised by
                the next `denoise` or `sample`, whatever key that names.
        """
        parcel = self._parcel()
        try:
            described = {name: parcel.put(source(tensor)) for name, tensor in tensors.items()}
        except BaseException:
            parcel.release()
            raise
        fields = {"run": self.id, "key": key, "tensors": described, "values": dict(values or {})}
        request = self._begin(m.PutConditioning, fields, parcel)
        if wait:
            self._finish(request, self._hear, None, self._timeout)
        else:
            self._unheard.append(request)
        replaced = self._kept.pop(key, None)
        self._kept[key] = parcel
        if replaced is not None:
            self._replaced.append(replaced)

    def denoise(
        self, items: Sequence[tuple[T, Times, str]], *, interrupt: Interrupt | None = None
    ) -> list[T]:
        """One turn on the group: all items are answered together.

        Args:
            items: (x, t, conditioning key); x [B, C, H, W] as the diffusion model gets it, t a number or one per
                batch entry, in the family's own units (see protocol.md).

        Returns:
            For each item the network's raw output, shaped and typed as x.
        """
        self._check()
        arena = self._connection.arena
        if arena is None:
            return self._denoise_in_frames(items, interrupt)
        step = Step(arena)
        try:
            asked = []
            for x, t, key in items:
                given, room = step.put(source(x))
                asked.append(m.DenoiseItem(x=given, t=times(t), conditioning=key, out=room))
        except BaseException:
            step.release()
            raise
        replaced = self._replaced[:]
        request = self._begin(m.Denoise, {"run": self.id, "items": tuple(asked)}, step)
        results = [like(item[0], buffer) for item, buffer in zip(items, step.ahead(), strict=True)]
        answer, _ = self._finish_turn(request, replaced, self._hear, interrupt)
        try:
            step.lend(answer.outputs)
        finally:
            step.release()
        return results

    def _denoise_in_frames(
        self, items: Sequence[tuple[T, Times, str]], interrupt: Interrupt | None
    ) -> list[T]:
        parcel = self._parcel()
        asked = tuple(
            m.DenoiseItem(x=parcel.put(source(x)), t=times(t), conditioning=key) for x, t, key in items
        )
        request = self._begin(m.Denoise, {"run": self.id, "items": asked}, parcel)
        answer, frames = self._finish_turn(request, self._replaced[:], self._hear, interrupt)
        if len(answer.outputs) != len(items):
            raise XditError(
                Code.BAD_MESSAGE,
                f"The daemon answered {len(items)} items with {len(answer.outputs)} outputs.",
            )
        return [
            like(item[0], parcel.open(output, None, frames))
            for item, output in zip(items, answer.outputs, strict=True)
        ]

    def sample(
        self,
        noise: T,
        sigmas: Sequence[float],
        conditioning: str,
        *,
        sampler: str = "euler",
        negative: str | None = None,
        cfg: float = 1.0,
        latent: T | None = None,
        callback: Callable[[int, int, float, T | None], None] | None = None,
        previews: bool = True,
        interrupt: Interrupt | None = None,
        warmup: int = 1,
        patches: int = 0,
    ) -> T:
        """The whole sampling loop in the ranks, a turn per step.

        Args:
            noise: of unit variance, [B, C, H, W].
            sigmas: descending, one more than there are steps.
            conditioning, negative: keys of the positive and negative; the latter is used where cfg is not 1.
            sampler: "euler", "heun", "dpmpp_2m" or "ddim".
            cfg: scale of classifier-free guidance.
            latent: to start from, in the model's own scale; None is zeros.
            callback: called in this thread with (step, total, sigma, x0) after every step; x0 is a copy, or None
                where a later one has come already. What it raises cancels the run.
            previews: False leaves x0 out.
            warmup, patches: with pipefusion: steps computed exactly, and patches after them; 0: as many as stages.

        Returns:
            The latent in the model's own scale, shaped and typed as the noise.
        """
        asked = {
            "run": self.id,
            "sampler": sampler,
            "sigmas": times(sigmas),
            "conditioning": conditioning,
            "negative": negative,
            "cfg": float(cfg),
            "warmup": warmup,
            "patches": patches,
        }
        parcel = self._parcel()
        try:
            fields = sampling.put(parcel, noise, latent, callback is not None and previews, asked)
        except BaseException:
            parcel.release()
            raise
        replaced = self._replaced[:]
        request = self._begin(m.Sample, fields, parcel)

        def hear(event: Any, frames: list[Any]) -> None:
            self._hear(event, frames)
            if callback is None or not isinstance(event, m.Progress):
                return
            x0 = sampling.preview(parcel, noise, event, frames)
            if x0 is not None and sampling.torn(fields, self._connection.behind(request)):
                x0 = None
            callback(event.step, event.total, event.sigma, x0)

        answer, frames = self._finish_turn(request, replaced, hear, interrupt)
        try:
            return sampling.opened(parcel, noise, fields, answer, frames)
        finally:
            parcel.release()

    def decode(
        self,
        latent: T,
        *,
        clamp: bool = True,
        tile: int | None = None,
        interrupt: Interrupt | None = None,
    ) -> T:
        """VAE: latent [B, C, h, w], unscaled as ComfyUI's LATENT, to image [B, H, W, 3] float32 in 0..1.

        Args:
            clamp: False leaves values outside of 0..1 as they are, for whoever blends tiles before cutting.
            tile: the side in pixels of tiles that are decoded one after the other and blended, which takes less memory and
                is approximate; 0 decodes the picture whole. None does too, and where the device's memory runs out in
                tiles, unless the run's fallback is "never"; `degraded` then says so.
        """
        put = partial(vae.put_latent, latent=latent, clamp=clamp, tile=tile)
        opened = partial(vae.opened, given=latent)
        image: T = self._turn(m.Decode, put, opened, interrupt)
        return image

    def encode(self, image: T, *, tile: int | None = None, interrupt: Interrupt | None = None) -> T:
        """VAE: image [B, H, W, 3] in 0..1 to latent [B, C, h, w] float32, unscaled. For `tile` see `decode`."""
        put, opened = partial(vae.put_image, image=image, tile=tile), partial(vae.opened, given=image)
        latent: T = self._turn(m.Encode, put, opened, interrupt)
        return latent

    def encode_text(
        self,
        tokens: T,
        *,
        vectors: T | None = None,
        mask: T | None = None,
        layer: int | None = None,
        final_norm: bool = True,
        pooled: str = "none",
        interrupt: Interrupt | None = None,
    ) -> tuple[T, T | None]:
        """Text encoder: tokens [B, n] to hidden states [B, n, width] and the pooled output [B, width], both float32.

        Args:
            tokens: int32 or int64; -1 - i stands for row i of `vectors`.
            vectors: [k, width], of textual inversion.
            mask: [B, n] int32, int64 or uint8: what is 0 is not attended to; None attends to all.
            layer: whose hidden state: 0 is the first block's, -1 the last's; None is the last's after the final norm.
            final_norm: whether the hidden state of a `layer` goes through the final norm, too.
            pooled: "none"; of CLIP "plain", that of the text's end, or "projected", that times the projection.
        """
        asked = {"layer": layer, "final_norm": final_norm, "pooled": pooled}
        put = partial(text.put, tokens=tokens, vectors=vectors, mask=mask, asked=asked)
        opened = partial(text.opened, given=tokens)
        results: tuple[T, T | None] = self._turn(m.EncodeText, put, opened, interrupt)
        return results

    # ---------------------------------------------------------------------------------------------------- its end

    def cancel(self) -> None:
        """Ends the run, from any thread: after the step it is in, if it is in one; returns when it has ended."""
        self._end(m.Cancel)

    def close(self) -> None:
        """Ends the run and frees its conditioning. Nothing happens where it has ended already."""
        self._end(m.Close)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._cancel_unheard()

    def _end(self, kind: type[Struct]) -> None:
        if self._ended is not None or self._pid != os.getpid() or not self._connection.alive:
            return
        try:
            self._connection.ask(kind, {"run": self.id}, timeout=self._timeout, late=self._over)
        except XditError as error:
            # The daemon is gone, or had ended the run before: that is what was wanted.
            if error.code not in (Code.DAEMON_LOST, Code.NO_SUCH_RUN):
                raise
        verb = "cancelled" if kind is m.Cancel else "closed"
        self._ended = XditError(Code.RUN_CANCELLED, f"Run {self.id} was {verb}; open a new run.")
        self._over()

    def _cancel_unheard(self) -> None:
        """Cancels without waiting for the answer; the slots are held until it has come."""
        if self._ended is None and self._pid == os.getpid():
            self._ended = XditError(Code.RUN_CANCELLED, f"Run {self.id} was cancelled; open a new run.")
            self._connection.tell(m.Cancel, {"run": self.id}, self._over)

    def _over(self, answer: Any = None) -> None:
        """The daemon has ended the run, as `answer` says: no rank reads its conditioning any more."""
        if self._ended is None:
            self._ended = XditError(Code.RUN_CANCELLED, f"Run {self.id} was closed; open a new run.")
            if isinstance(answer, m.RunEnded):
                self._ended = XditError(answer.code, answer.message)
        while self._kept:
            self._kept.popitem()[1].release()
        while self._replaced:
            self._replaced.pop().release()
        self._connection.listeners.pop(self.id, None)

    # ----------------------------------------------------------------------------------------------------- asking

    def _parcel(self) -> Parcel:
        self._check()
        connection = self._connection
        return Parcel(connection.arena, connection.welcome.limits.frame_bytes)

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise forked(self._pid)
        if self._ended is not None:
            raise anew(self._ended)
        if not self._connection.alive:
            raise XditError(
                Code.RUN_LOST,
                f"Run {self.id} is lost: the daemon that it was open on was restarted, or the connection to it ended. "
                "Open a new run.",
            )

    def _finish(
        self, request: Request, hear: Hear, interrupt: Interrupt | None, timeout: float | None = None
    ) -> tuple[Any, list[Any]]:
        try:
            return self._connection.finish(request, hear=hear, interrupt=interrupt, timeout=timeout)
        finally:
            if request.abandoned:
                self._cancel_unheard()

    def _begin(self, kind: type[Struct], fields: dict[str, Any], parcel: Parcel | Step) -> Request:
        """Sends what comes after conditioning, which it must not overtake.

        Lane and ZeroMQ may overtake each other: what cannot go the way of conditioning whose answer was not waited
        for, waits for that answer now.
        """
        if self._unheard:
            if all(request.by_lane for request in self._unheard):
                request = self._connection.begin_by_lane(kind, fields, parcel)
                if request is not None:
                    return request
            try:
                self._hear_conditioning()
            except BaseException:
                parcel.release()
                raise
        return self._connection.begin(kind, fields, parcel)

    def _finish_turn(
        self, request: Request, replaced: list[Parcel], hear: Hear, interrupt: Interrupt | None
    ) -> tuple[Any, list[Any]]:
        """Waits for the answer of a turn, and looks at those that were not waited for before it.

        Args:
            replaced: of the conditioning that had been put anew when the turn was asked. Its answer tells that the
                ranks have read what came before; and a group that takes the run over is given what there is now.
        """
        try:
            answer = self._finish(request, hear, interrupt)
        except XditError:
            self._hear_conditioning()  # if that was refused, it is the cause
            raise
        try:
            self._hear_conditioning()
        except BaseException:
            if request.parcel is not None:
                request.parcel.release()
            raise
        for parcel in replaced:
            if parcel in self._replaced:
                self._replaced.remove(parcel)
                parcel.release()
        return answer

    def _hear_conditioning(self) -> None:
        while self._unheard:
            self._finish(self._unheard.pop(0), self._hear, None, self._timeout)

    def _hear(self, event: Any, frames: list[Any]) -> None:
        if isinstance(event, m.Rebound):
            self.group, self.plan = event.group, event.plan or self.plan
            self.degraded = event.degraded or self.degraded
        if self._on_event is not None:
            self._on_event(event)

    def _turn(
        self,
        kind: type[Struct],
        put: Callable[..., dict[str, Any]],
        opened: Callable[..., Any],
        interrupt: Interrupt | None,
    ) -> Any:
        """A request with tensors of its own: `put` into a parcel as the message's fields, `opened` when it is answered."""
        parcel = self._parcel()
        try:
            fields = {"run": self.id, **put(parcel, self.model.facts)}
        except BaseException:
            parcel.release()
            raise
        request = self._connection.begin(kind, fields, parcel)
        answer, frames = self._finish(request, self._hear, interrupt)
        self.degraded = getattr(answer, "degraded", "") or self.degraded
        try:
            return opened(parcel, fields=fields, answer=answer, frames=frames)
        finally:
            parcel.release()


def forked(pid: int) -> XditError:
    """The error for a client in a process that was forked from its own."""
    return XditError(
        Code.NOT_PERMITTED,
        f"This client belongs to process {pid} and cannot be used in process {os.getpid()}, which was forked from it; "
        "make a new Client there.",
    )
