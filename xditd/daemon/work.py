"""What a client's request becomes: the orders that its turns send to the ranks, and the answer they add up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import structs

from xditd.daemon.runs import Asked, Work
from xditd.protocol import messages as m
from xditd.protocol import orders as o
from xditd.protocol.errors import Code
from xditd.protocol.tensors import ITEMSIZE, Tensor

Answer = m.Denoised | m.Sampled | m.Decoded | m.Encoded | m.TextEncoded
Turn = o.TurnDenoise | o.TurnSample | o.TurnDecode | o.TurnEncode | o.TurnEncodeText


def begin(run: int, work: m.Sample, singly: bool = False) -> o.BeginSample:
    """The order before a sample's first turn.

    Args:
        singly: its batch is computed one item after another.
    """
    return o.BeginSample(
        run=run,
        sampler=work.sampler,
        sigmas=work.sigmas,
        noise=work.noise,
        latent=work.latent,
        conditioning=work.conditioning,
        negative=work.negative,
        cfg=work.cfg,
        out=work.out,
        previews=work.previews,
        preview_frames=work.preview_frames,
        warmup=work.warmup,
        patches=work.patches,
        singly=singly,
    )


def turn(order: int, run: int, asked: Asked, singly: bool = False, tiles: bool = False) -> Turn:
    """The order of a request's next turn.

    Args:
        singly: as of `begin`.
        tiles: a picture may be computed in tiles where memory runs out.
    """
    work = asked.work
    if isinstance(work, m.Denoise):
        return o.TurnDenoise(order=order, run=run, items=work.items, singly=singly)
    if isinstance(work, m.Sample):
        return o.TurnSample(order=order, run=run, step=asked.step)
    if isinstance(work, m.Decode):
        return o.TurnDecode(
            order=order,
            run=run,
            latent=work.latent,
            clamp=work.clamp,
            out=work.out,
            singly=singly,
            tile=work.tile or 0,
            tiles=tiles and work.tile is None,
        )
    if isinstance(work, m.Encode):
        return o.TurnEncode(
            order=order,
            run=run,
            image=work.image,
            out=work.out,
            singly=singly,
            tile=work.tile or 0,
            tiles=tiles and work.tile is None,
        )
    return o.TurnEncodeText(
        order=order,
        run=run,
        tokens=work.tokens,
        vectors=work.vectors,
        mask=work.mask,
        layer=work.layer,
        final_norm=work.final_norm,
        pooled=work.pooled,
        out=work.out,
        pooled_out=work.pooled_out,
    )


PICTURE = 16 * 128 * 128
"""Elements of a latent of 1024 × 1024 pixels."""


def effort(work: Work) -> float:
    """How much one turn of it is, roughly: 1 for what every turn costs, and 1 for each picture of 1024 × 1024."""
    if isinstance(work, m.Denoise):
        elements = sum(item.x.nbytes // ITEMSIZE[item.x.dtype] for item in work.items)
    elif isinstance(work, m.Sample):
        elements = work.noise.nbytes // ITEMSIZE[work.noise.dtype] * (1 if work.cfg == 1.0 else 2)
    elif isinstance(work, m.Decode):
        elements = work.latent.nbytes // ITEMSIZE[work.latent.dtype]
    elif isinstance(work, m.Encode):
        elements = work.image.nbytes // ITEMSIZE[work.image.dtype] // 12  # a latent's elements of its pixels'
    else:
        elements = 0  # a text
    return 1.0 + elements / PICTURE


def step_effort(facts: Mapping[str, int], size: tuple[int, int], calls: int) -> float:
    """The effort of a step of one picture of so many pixels, as `effort` counts that of its turn."""
    scale = facts.get("scale", 8)
    return 1.0 + calls * facts.get("latent_channels", 16) * size[0] * size[1] / scale**2 / PICTURE


def batch_of(work: Work) -> int:
    """Items that one call of the network has at once, of those that could be computed one after another."""
    if isinstance(work, m.Denoise):
        return max(item.x.shape[0] for item in work.items)
    if isinstance(work, m.Sample):
        return work.noise.shape[0]
    if isinstance(work, m.Decode):
        return work.latent.shape[0]
    return work.image.shape[0] if isinstance(work, m.Encode) else 1


def alone(tensor: Tensor, frames: Sequence[Any]) -> tuple[Tensor, Sequence[Any]]:
    """One of several outputs as a message of its own has it: with its frame, if it has one, and no other."""
    if tensor.frame is None:
        return tensor, ()
    return structs.replace(tensor, frame=0), frames[tensor.frame : tensor.frame + 1]


def progress(run: int, asked: Asked, work: m.Sample, preview: Tensor | None) -> m.Progress:
    """The event after a sample's turn."""
    return m.Progress(
        re=work.id,
        run=run,
        step=asked.step,
        total=asked.turns,
        sigma=work.sigmas[asked.step],
        preview=preview,
    )


def answer(
    asked: Asked, report: o.TurnDone, frames: Sequence[Any], degraded: str = ""
) -> tuple[Answer, Sequence[Any]]:
    """The answer after a request's last turn, and its frames.

    Args:
        degraded: why the run is not done as asked.
    """
    work, seconds = asked.work, asked.seconds
    if isinstance(work, m.Denoise):
        return m.Denoised(re=work.id, outputs=report.outputs, seconds=seconds), frames
    if isinstance(work, m.EncodeText):
        hidden, *pooled = report.outputs
        reply = m.TextEncoded(
            re=work.id, hidden=hidden, pooled=pooled[0] if pooled else None, seconds=seconds
        )
        return reply, frames
    output, frames = alone(report.outputs[0], frames)
    if isinstance(work, m.Sample):
        sampled = m.Sampled(re=work.id, latent=output, steps=asked.turns, seconds=seconds, degraded=degraded)
        return sampled, frames
    if isinstance(work, m.Decode):
        return m.Decoded(re=work.id, image=output, seconds=seconds, degraded=degraded), frames
    return m.Encoded(re=work.id, latent=output, seconds=seconds, degraded=degraded), frames


def failed(request: int | None, code: Code | str, message: str) -> m.Failed:
    return m.Failed(re=request, code=spell(code), message=message)


def spell(code: Code | str) -> str:
    """The code as it travels."""
    return code.value if isinstance(code, Code) else code
