"""Asks the daemon once where ComfyUI calls the model several times in a step.

ComfyUI computes texts of different lengths, or different areas, in calls of their own, one after the other. Their
inputs do not depend on each other's outputs: so a step is gone through twice, once to take down the calls, which are
answered with zeros, and once to give their answers. All arithmetic is ComfyUI's, in its order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import comfy.patcher_extension
import torch

if TYPE_CHECKING:
    from .sampling import Item

Wrappers = comfy.patcher_extension.WrappersMP

NAME = "xditd"
"""Of our own wrappers."""

INSIDE = (Wrappers.APPLY_MODEL, Wrappers.DIFFUSION_MODEL, Wrappers.CALC_COND_BATCH)
"""Kinds of wrappers that run within a step."""

Identity = tuple[tuple[Any, Any], ...]
"""The tensors of a conditioning entry, each with a trace of its contents."""

SAMPLED = 256
"""Values of a tensor that are looked at between two steps."""


class Joint:
    """The steps of one sampling, one at a time.

    Args:
        denoise: asks the daemon for all items at once.
    """

    def __init__(self, denoise: Callable[[Sequence[Item]], list[torch.Tensor]]) -> None:
        self._denoise = denoise
        self._taken: list[Item] | None = None
        self._answers: list[torch.Tensor] | None = None
        self._seen: dict[tuple[int, str], Identity] = {}
        self._known: set[tuple[int, str]] = set()

    def step(self, execute: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """One `calc_cond_batch`: (model, conds, x, timestep, model_options)."""
        _model, conds, _, _, model_options = arguments
        if foreign(model_options, INSIDE):  # it may change what a call is given, and not bear to run twice
            return execute(*arguments)
        with self._looking_at(conds):
            if not _several(conds):
                return execute(*arguments)
            self._taken = []
            try:
                execute(*arguments)
                taken = self._taken
            finally:
                self._taken = None
            self._answers = self._denoise(taken) if taken else []
            try:
                return execute(*arguments)
            finally:
                self._answers = None

    def answer(self, items: Sequence[Item]) -> list[torch.Tensor] | None:
        """What a call is to return: zeros while calls are taken down, answers afterwards; None: ask."""
        if self._taken is not None:
            self._taken.extend(items)
            return [torch.zeros_like(item.x) for item in items]
        if self._answers is not None:
            given, self._answers = self._answers[: len(items)], self._answers[len(items) :]
            if len(given) < len(items):
                raise RuntimeError(
                    "ComfyUI called the model otherwise the second time it went through a step."
                )
            return given
        return None

    def knows(self, kind: int, uuid: Any) -> bool:
        """Whether the entry's contents are those of the last step, by the identity of its tensors."""
        return (kind, str(uuid)) in self._known

    @contextlib.contextmanager
    def _looking_at(self, conds: Sequence[Any]) -> Iterator[None]:
        """While it lasts, `knows` tells which entries have the very tensors of the step before, unwritten since."""
        for kind, entries in enumerate(conds):
            for entry in entries or ():
                name, parts = (kind, str(entry.get("uuid"))), _identity(entry)
                if _alike(self._seen.get(name), parts):
                    self._known.add(name)
                self._seen[name] = parts
        try:
            yield
        finally:
            self._known.clear()


def _alike(before: Identity | None, after: Identity) -> bool:
    return (
        before is not None
        and len(before) == len(after)
        and all(a[0] is b[0] and a[1] == b[1] for a, b in zip(before, after, strict=True))
    )


def _identity(entry: dict[str, Any]) -> Identity:
    held = [getattr(value, "cond", value) for _, value in sorted(entry.get("model_conds", {}).items())]
    return tuple((value, _trace(value)) for value in held)


def _trace(value: Any) -> Any:
    """What a write to a tensor would change: a sample of its values, as tensors of inference mode count no writes."""
    if not isinstance(value, torch.Tensor):
        return None
    flat = value.flatten() if value.is_contiguous() else value.reshape(-1)
    return float(flat[:: max(1, flat.numel() // SAMPLED)].sum())


def _several(conds: Sequence[Any]) -> bool:
    """Whether ComfyUI will make more than one call of these, as far as shapes tell."""
    entries = [entry for group in conds for entry in group or ()]
    shapes = {
        (
            entry.get("area"),
            *(
                (name, getattr(getattr(value, "cond", None), "shape", None))
                for name, value in sorted(entry["model_conds"].items())
            ),
        )
        for entry in entries
    }
    return len(shapes) > 1


def foreign(model_options: dict[str, Any], kinds: Sequence[str]) -> bool:
    """Whether another's wrapper of these kinds is there, or a callback, or a function around the model."""
    options = model_options.get("transformer_options", {})
    wrappers = options.get("wrappers", {})
    strange = any(found for kind in kinds for name, found in wrappers.get(kind, {}).items() if name != NAME)
    callbacks = any(any(entries.values()) for entries in options.get("callbacks", {}).values())
    return strange or callbacks or "model_function_wrapper" in model_options
