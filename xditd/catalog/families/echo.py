"""The family without a model: ranks that do no work, so that tests and benchmarks see the hand-off alone.

It is served only where the configuration says so (`debug.echo`), and takes any shape.
"""

from __future__ import annotations

from collections.abc import Mapping

from xditd.catalog.families import inputs
from xditd.catalog.families.family import Detected, Kinds
from xditd.catalog.header import Header
from xditd.protocol.messages import ModelInfo, Plan, Sample
from xditd.protocol.noise import Noise
from xditd.protocol.tensors import FLOATS, Tensor

name = "echo"
label = "the echo of tests"
part = ""
parallel = True
layers = ""
dtypes = FLOATS


def detect(header: Header, prefix: str) -> Detected | None:
    return None


def noise(facts: Mapping[str, int]) -> Noise:
    """None: it computes nothing."""
    return Noise(predicts="flow")


def parameters(facts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """None: it has no weights."""
    return {}


def attention(facts: Mapping[str, int]) -> tuple[Kinds, ...]:
    """None: its tokens are not dealt out."""
    return ()


def check_plan(info: ModelInfo, plan: Plan) -> None:
    """Any plan: nothing is split."""


def check_conditioning(info: ModelInfo, tensors: Mapping[str, Tensor], values: Mapping[str, float]) -> None:
    """Any conditioning: nothing reads it."""


def check_denoise(
    info: ModelInfo,
    x: Tensor,
    t: tuple[float, ...],
    conditioning: Mapping[str, Tensor],
    out: Tensor | None = None,
) -> None:
    """Any x; out as x, which is answered."""
    inputs.check_dtype("x", x)
    _check_alike("out", out, x, "x")


def check_sample(
    info: ModelInfo,
    message: Sample,
    conditioning: Mapping[str, Tensor],
    negative: Mapping[str, Tensor] | None = None,
) -> None:
    """Any noise; latent shaped as noise, out and previews as noise, which is answered."""
    inputs.check_loop(message, highest=float("inf"))
    given = message.noise
    inputs.check_dtype("noise", given)
    inputs.check_same_shape("latent", message.latent, given, "noise")
    _check_alike("out", message.out, given, "noise")
    for i, preview in enumerate(message.previews):
        _check_alike(f"preview {i}", preview, given, "noise")


def check_decode(info: ModelInfo, latent: Tensor, out: Tensor | None = None, tile: int = 0) -> None:
    """Any latent to any out: out's first bytes are written with the latent's."""


def check_encode(info: ModelInfo, image: Tensor, out: Tensor | None = None, tile: int = 0) -> None:
    """Any image to any out."""


def _check_alike(what: str, tensor: Tensor | None, other: Tensor, of: str) -> None:
    """Bytes are copied as they are, so the dtype must be the same too."""
    inputs.check_same_shape(what, tensor, other, of)
    if tensor is not None:
        inputs.check_dtype(what, tensor, (other.dtype,))
