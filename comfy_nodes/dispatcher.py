"""What XDIT_DISPATCHER carries: which model, on which daemon, under which plan. A wish, not a connection.

ComfyUI keeps the outputs of nodes for hours, over restarts of the daemon. So nothing here is alive: whoever uses a
dispatcher has the daemon see to it anew, which costs nothing where the model is warm.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelRef, PlanRequest
from xditd.protocol.plans import FP8, LoraRef, spread_devices

STRATEGIES = ("auto", "Hybrid", "USP", "PipeFusion", "CFG", "Tensor")
SCHEDULINGS = ("round_robin", "least_loaded", "weighted_round_robin", "adaptive")

WEIGHT_DTYPES = {"default": "", "fp8_e4m3fn": FP8[0], "fp8_e4m3fn_fast": FP8[0], "fp8_e5m2": FP8[1]}
"""The stock loader's weight_dtype, in its order: what a plan calls it."""

FAST = "fp8_e4m3fn_fast"
"""The one that is arithmetic in fp8, too."""

_NAME = re.compile(r"(cuda:|cpu:)?[0-9]{1,4}")


@dataclass(frozen=True)
class Dispatcher:
    """A model as the loaders were told to have it.

    Attributes:
        endpoint: of the daemon; "" looks where a client looks.
        model: the file.
        plan: the devices, the strategy, how many replicas, and which of them takes a run.
        allow_approximate: as the loaders' input of this name.
        lora: that runs have merged, in this order.
    """

    endpoint: str
    model: ModelRef
    plan: PlanRequest
    allow_approximate: bool = False
    lora: tuple[LoraRef, ...] = ()

    def part(self, part: str) -> Dispatcher:
        """The same choices for another part of the same checkpoint, on a device that the daemon chooses."""
        model = ModelRef(kind=self.model.kind, name=self.model.name, part=part, size=self.model.size)
        return replace(self, model=model, plan=PlanRequest(devices=self.plan.devices[:1]), lora=())


def weight_dtype(chosen: str) -> str:
    """What a plan calls a choice of the input weight_dtype.

    Raises:
        XditError: `not_built` for arithmetic in fp8; `bad_value` for a choice that there is not.
    """
    if chosen not in WEIGHT_DTYPES:
        raise XditError(
            Code.BAD_VALUE, f"There is no weight_dtype {chosen!r}; choose {', '.join(WEIGHT_DTYPES)}."
        )
    if chosen == FAST:
        raise XditError(
            Code.NOT_BUILT,
            f"weight_dtype {FAST} computes in fp8, which this version of xditd does not; choose fp8_e4m3fn, which keeps the same "
            "weights and computes with them in the model's own dtype.",
        )
    return WEIGHT_DTYPES[chosen]


def device_names(text: str) -> tuple[str, ...]:
    """The devices of a gpu_devices input: "0,1,2,3", "0-3" or "cuda:0, cuda:1"; "" is all that the daemon owns.

    Raises:
        XditError: `bad_device` for what names none, or one twice.
    """
    if not text.strip():
        return ()
    names: list[str] = []
    for name in text.replace("\uff0c", ",").split(","):  # a Chinese keyboard's comma too
        spread = spread_devices(name.strip())
        if not all(_NAME.fullmatch(single) for single in spread):
            raise XditError(
                Code.BAD_DEVICE,
                f"gpu_devices has {name.strip()!r}, which names no device; write numbers, as in 0,1,2,3 or 0-3, or leave "
                "it empty for all that the daemon owns.",
            )
        names += spread
    if len(set(names)) < len(names):
        raise XditError(Code.BAD_DEVICE, f"gpu_devices names a device twice: {text}.")
    return tuple(names)


def refuse_unbuilt(*, strategy: str, scheduling: str, allow_approximate: bool) -> None:
    """Refuses choices that this version knows and does not have; none is ignored.

    Raises:
        XditError: `not_built`, with what works instead; `bad_value` for a choice that there is not.
    """
    for chosen, choices in ((strategy, STRATEGIES), (scheduling, SCHEDULINGS)):
        if chosen not in choices:
            raise XditError(Code.BAD_VALUE, f"There is no {chosen!r}; choose {', '.join(choices)}.")
    unbuilt: Sequence[tuple[bool, str, str]] = (
        (
            allow_approximate,
            "an approximate plan of auto's or Hybrid's own choice",
            "the strategy PipeFusion by its name, with allow_approximate off",
        ),
    )
    for asked, what, works in unbuilt:
        if asked:
            raise XditError(
                Code.NOT_BUILT, f"This version of xditd does not have {what} yet; choose {works}."
            )
