"""Checks of inputs that several families share. Each raises one sentence; none knows a family."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise

from xditd.catalog.sentences import listed, shape_of
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import Plan, Sample
from xditd.protocol.plans import degrees_of
from xditd.protocol.samplers import SAMPLERS
from xditd.protocol.tensors import FLOATS, Tensor

ROUNDING = 1e-5
"""Of a sigma that a client computed in float32."""


def check_names(what: str, given: Iterable[str], known: tuple[str, ...], required: tuple[str, ...]) -> None:
    """Refuses a name that is not known and a required one that is missing.

    Raises:
        XditError: `bad_value`.
    """
    names = set(given)
    strange = sorted(names.difference(known))
    if strange:
        takes = f"the {what}s {', '.join(known)}" if known else f"no {what}s"
        raise XditError(
            Code.BAD_VALUE, f"This model's conditioning takes {takes}, but {listed(strange)} came."
        )
    for name in required:
        if name not in names:
            raise XditError(
                Code.BAD_VALUE,
                f"This model's conditioning needs the {what} {name}; "
                f"it takes {', '.join(known)}, of which {listed(sorted(names)) or 'none'} came.",
            )


def check_dtype(what: str, tensor: Tensor, dtypes: tuple[str, ...] = FLOATS) -> None:
    """Refuses a dtype that is none of these.

    Raises:
        XditError: `bad_tensor`.
    """
    if tensor.dtype not in dtypes:
        raise XditError(
            Code.BAD_TENSOR, f"{what} has dtype {tensor.dtype!r}; it must be {' or '.join(dtypes)}."
        )


def check_shape(what: str, tensor: Tensor, expected: tuple[int | str, ...]) -> None:
    """Refuses another shape; a name in `expected` ("H") stands for any size.

    Raises:
        XditError: `bad_tensor`.
    """
    fits = len(tensor.shape) == len(expected) and all(
        isinstance(want, str) or size == want for size, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        raise XditError(
            Code.BAD_TENSOR, f"{what} has shape {shape_of(tensor.shape)}; it must be {shape_of(expected)}."
        )


def check_batch(what: str, tensor: Tensor, batch: int) -> None:
    """Refuses a batch that is neither 1 nor the latent's.

    Raises:
        XditError: `bad_tensor`.
    """
    if tensor.shape[0] not in (1, batch):
        allowed = "1" if batch == 1 else f"1 or {batch}"
        raise XditError(
            Code.BAD_TENSOR,
            f"{what} has batch {tensor.shape[0]}; beside a latent of batch {batch} it must be {allowed}.",
        )


def check_same_shape(what: str, tensor: Tensor | None, other: Tensor, of: str) -> None:
    """Refuses a tensor that is not shaped as another; None passes.

    Raises:
        XditError: `bad_tensor`.
    """
    if tensor is None:
        return
    check_dtype(what, tensor)
    if tensor.shape != other.shape:
        raise XditError(
            Code.BAD_TENSOR,
            f"{what} has shape {shape_of(tensor.shape)}; it must have that of {of}, {shape_of(other.shape)}.",
        )


def check_times(t: tuple[float, ...], batch: int, low: float, high: float) -> None:
    """Refuses timesteps that are not finite, not within the range, or neither one nor one per latent.

    Raises:
        XditError: `bad_value`.
    """
    if len(t) not in (1, batch):
        allowed = "1" if batch == 1 else f"1 or {batch}"
        raise XditError(
            Code.BAD_VALUE, f"t has {len(t)} values; for a latent of batch {batch} it must have {allowed}."
        )
    for value in t:
        if not (math.isfinite(value) and low <= value <= high):
            raise XditError(
                Code.BAD_VALUE, f"t is {value}; this model's timesteps lie between {low:g} and {high:g}."
            )


def check_loop(message: Sample, highest: float) -> None:
    """Refuses a sampling loop that cannot be run: its sampler, its sigmas, its cfg.

    Args:
        message: the request.
        highest: the model's largest sigma.

    Raises:
        XditError: `bad_value`.
    """
    if message.sampler not in SAMPLERS:
        raise XditError(
            Code.BAD_VALUE,
            f"The ranks do not run the sampler {message.sampler!r}; they run {', '.join(SAMPLERS)}. "
            "For any other let the loop run in the client, with `denoise`.",
        )
    sigmas = message.sigmas
    if len(sigmas) < 2:
        raise XditError(
            Code.BAD_VALUE, "A sample needs at least two sigmas, from where and to where it steps."
        )
    for sigma in sigmas:
        if not (math.isfinite(sigma) and 0 <= sigma <= highest * (1 + ROUNDING)):
            raise XditError(
                Code.BAD_VALUE, f"A sigma is {sigma}; this model's sigmas lie between 0 and {highest:g}."
            )
    for before, after in pairwise(sigmas):
        if not after < before:
            raise XditError(
                Code.BAD_VALUE, f"The sigmas must descend strictly, but {after:g} comes after {before:g}."
            )
    if not (math.isfinite(message.cfg) and message.cfg > 0):
        raise XditError(Code.BAD_VALUE, f"cfg is {message.cfg}; it must be finite and above 0.")
    if message.cfg != 1 and message.negative is None:
        raise XditError(
            Code.BAD_VALUE,
            f"cfg {message.cfg:g} needs a negative conditioning; give `negative`, or cfg 1, which needs none.",
        )


def check_degrees_built(label: str, plan: Plan, built: tuple[str, ...]) -> None:
    """Refuses a degree above 1 that this version has not.

    Raises:
        XditError: `not_built`.
    """
    for name, degree in degrees_of(plan).items():
        if name not in built:
            can = " and ".join(built) if built else "one device"
            raise XditError(
                Code.NOT_BUILT, f"{name} {degree} is not built for {label} in this version; {can} would work."
            )


def check_one_device(label: str, plan: Plan) -> None:
    """Refuses more than one device.

    Raises:
        XditError: `not_built`.
    """
    check_degrees_built(label, plan, ())
    if len(plan.devices) != 1:
        raise XditError(
            Code.NOT_BUILT,
            f"{label} on {len(plan.devices)} devices is not built in this version; name one device for it.",
        )
