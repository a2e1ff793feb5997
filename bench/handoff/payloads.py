"""What travels: the payloads S, M and XL, fresh random contents for each call, and what must come back.

The rank does no work, but what it answers depends on all it was sent, so that a stale or a half-read
result cannot pass. Knows nothing of how anything travels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

CONTEXT = (1, 512, 4096)
POOLED = (1, 768)
LATENT = (1, 16, 128, 128)


@dataclass(frozen=True, slots=True)
class Form:
    """Dtype and shape of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Payload:
    """One kind of job."""

    name: str
    says: str
    inputs: dict[str, Form]
    output: Form
    warm_ups: int  # untimed calls before the timed one: caches settle after four, and hold no 50 MB
    share: float  # of the rounds that it takes part in: the slow payloads need fewer
    again: bool = False  # the job before once more with another x: its conditioning need not travel
    paced: str = (
        ""  # another payload's name: what travels is that, but after a pause, as between a model's steps
    )

    @property
    def travels(self) -> str:
        """The name that peers know it by."""
        return self.paced or self.name

    def inputs_in_memory(self) -> dict[str, torch.Tensor]:
        """The inputs in private memory of the caller, every page touched."""
        return {name: torch.zeros(form.shape, dtype=form.dtype) for name, form in self.inputs.items()}


def refill(inputs: dict[str, torch.Tensor], generator: torch.Generator) -> None:
    """New random contents, all of them, in place: nobody pays for fresh pages."""
    for tensor in inputs.values():
        tensor.view(torch.int16).random_(0, _BF16_INFINITY, generator=generator)


def renew(payload: Payload, inputs: dict[str, torch.Tensor], generator: torch.Generator) -> None:
    """A new random number in every page of what travels: a stale answer cannot pass, and caches stay as they are."""
    for name, tensor in inputs.items():
        if payload.again and name != "x":
            continue
        tensor.view(torch.int16).flatten()[:: _PAGE // 2].random_(0, _BF16_INFINITY, generator=generator)


_PAGE = 4096

PAUSE = 0.02
"""Seconds before a paced call."""
_BF16_INFINITY = 0x7F80  # as bits; what is below is a finite number, and so equal to itself

_bf16 = torch.bfloat16
_x = Form(_bf16, LATENT)
_conditioning = {"context": Form(_bf16, CONTEXT), "pooled": Form(_bf16, POOLED)}

S = Payload("S", "a step: latent 16×128×128 bf16, 0.5 MB each way", {"x": _x}, _x, 4, 1.0)
PACED = Payload(
    "S paced",
    "the same step after a pause of 20 ms: every process has slept",
    {"x": _x},
    _x,
    1,
    0.5,
    paced="S",
)
M = Payload(
    "M",
    "a job: context 512×4096 and pooled 768 bf16 with the latent in, the latent out",
    {"x": _x, **_conditioning},
    _x,
    4,
    0.5,
)
XL = Payload(
    "XL",
    "images: latent 4×16×128×128 bf16 in, 4×1024×1024×3 float32 out, 50 MB",
    {"latent": Form(_bf16, (4, 16, 128, 128))},
    Form(torch.float32, (4, 1024, 1024, 3)),
    1,
    0.1,
)

M_AGAIN = Payload(
    "M again", "the job once more: its conditioning is there already", M.inputs, _x, 4, 0.5, again=True
)

PAYLOADS = {payload.name: payload for payload in (S, PACED, M, M_AGAIN, XL)}
SENT = (S, M, XL)
"""The payloads that every peer takes; only a peer that keeps conditioning takes the others."""
