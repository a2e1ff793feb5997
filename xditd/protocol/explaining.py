"""The messages by which a client learns why the planner chooses as it does."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct, field

from xditd.protocol.plans import ModelInfo, ModelRef, Plan, PlanRequest

Id = Annotated[int, Meta(ge=0, le=2**53)]
Pixels = Annotated[int, Meta(ge=0, le=65536)]


class Explain(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="explain", tag_field="type"):
    """Say which plan a model would have, and which others there are. Nothing is loaded."""

    id: Id
    model: ModelRef
    plan: PlanRequest = field(default_factory=PlanRequest)
    width: Pixels = 0  # of the picture, in pixels; 0: not said
    height: Pixels = 0


class Candidate(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One way of running the model."""

    plan: Plan
    verdict: str  # "chosen", "possible", "rejected"
    reason: str  # why, one sentence
    code: str = ""  # of what a request for it would be refused with
    exact: bool = True
    weights: int = 0  # bytes of each rank
    activations: int = 0  # bytes of each rank that are set aside for them
    tokens: int = 0  # of the picture on each rank; 0 where no size was said
    seconds: float | None = None  # of a step; None where nobody knows
    basis: str = ""  # of the seconds: "measured", "calibrated" by another plan's, "estimate"


class Explained(Struct, frozen=True, kw_only=True, tag="explained", tag_field="type"):
    re: Id
    model: ModelInfo
    dtype: str  # that it would compute in
    candidates: tuple[Candidate, ...]  # the chosen one first; without one the request would be refused
    code: str = ""  # with which, where none is chosen
    message: str = ""  # why, one sentence
