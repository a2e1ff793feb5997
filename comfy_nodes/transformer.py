"""The leaf of a MODEL: what ComfyUI takes for the diffusion model, and what asks the daemon instead of computing.

It holds no weights. Everything around it, from conditioning to sampler, is ComfyUI's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import comfy.patcher_extension
import torch

from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelInfo
from xditd.protocol.plans import LoraRef

from .dispatcher import Dispatcher
from .families import family
from .sampling import Item, Sampling

LORA = "xdit_lora"
"""The transformer option that says which LoRAs a MODEL has."""

OPTIONS = frozenset(
    {
        LORA,
        "cond_or_uncond",
        "uuids",
        "sigmas",
        "sample_sigmas",
        "wrappers",
        "callbacks",
        "patches",
        "patches_replace",
        "prefetch_dynamic_vbars",  # how weights come to a local GPU
        "easycache",  # state of a wrapper around the model
        "context_window",  # which part of a latent this is, for whoever wants to know
    }
)
"""Transformer options that are understood, or do nothing within a model. Any other may change a local model's result."""


class RemoteTransformer(torch.nn.Module):
    """A diffusion model that is elsewhere.

    Attributes:
        dispatcher: where.
        info: what the daemon found it to be.
        dtype: what ComfyUI casts its inputs to: what the daemon computes in.
        model_sampling: ComfyUI's own of the family.
        empty_prompt: the inputs that an empty prompt gives, where the loader has text encoders; else None.
    """

    def __init__(self, dispatcher: Dispatcher, info: ModelInfo, dtype: torch.dtype) -> None:
        super().__init__()
        self.dispatcher = dispatcher
        self.info = info
        self.dtype = dtype
        self.family = family(info)
        self.patch_size = self.family.patch_size
        self.empty_prompt: Callable[[], dict[str, torch.Tensor]] | None = None
        self.model_sampling: Any = None
        self._samplings: list[Sampling] = []  # the innermost last: a sampler may sample within a sampling
        self._finished: Sampling | None = None

    @contextlib.contextmanager
    def sampling(self, lora: tuple[LoraRef, ...] = ()) -> Iterator[Sampling]:
        """While it lasts, calls belong to one run, which ends with it.

        Args:
            lora: that the run has merged.
        """
        sampling = Sampling(replace(self.dispatcher, lora=lora))
        self._samplings.append(sampling)
        try:
            yield sampling
        except BaseException:
            sampling.close(failed=True)
            raise
        else:
            sampling.close(failed=False)
        finally:
            self._samplings.remove(sampling)
            self._finished = sampling

    @property
    def current(self) -> Sampling | None:
        return self._samplings[-1] if self._samplings else None

    def verdict(self) -> str:
        """How the last sampling went, in one line for people."""
        return "✅ nothing to do" if self._finished is None else self._finished.verdict()

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, context: Any = None, **inputs: Any
    ) -> torch.Tensor:
        """One call of ComfyUI's: x [B, C, H, W], timestep [B] and conditioning of one or more entries, one after the
        other in the batch."""
        options = inputs.pop("transformer_options", {})
        wrappers = comfy.patcher_extension.get_all_wrappers(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options
        )
        execute = comfy.patcher_extension.WrapperExecutor.new_class_executor(
            self._forward, self, wrappers
        ).execute
        return execute(x, timestep, context, transformer_options=options, **inputs)

    def _forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor,
        context: Any = None,
        transformer_options: Any = None,
        **inputs: Any,
    ) -> torch.Tensor:
        options = transformer_options or {}
        self.refuse(options, inputs)
        if self.current is None:  # somebody calls the model without sampling: a run of one call
            with self.sampling(options.get(LORA, ())):
                return self._call(x, timestep, {"context": context, **inputs}, options)
        return self._call(x, timestep, {"context": context, **inputs}, options)

    def _call(
        self, x: torch.Tensor, timestep: torch.Tensor, inputs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> torch.Tensor:
        sampling = self._samplings[-1]
        if inputs["context"] is None and self.empty_prompt is not None:
            inputs = {**inputs, **_for_batch(self.empty_prompt(), x)}
        kinds, uuids = options.get("cond_or_uncond") or [0], options.get("uuids") or [""]
        parts = len(kinds)
        shares = {name: value.chunk(parts) for name, value in inputs.items() if value is not None}
        items = []
        for i, (share, times) in enumerate(zip(x.chunk(parts), timestep.chunk(parts), strict=True)):
            tensors, values = self.family.conditioning(
                {name: chunks[i] for name, chunks in shares.items()}, self.info
            )
            # The index is part of the name: ComfyUI gives a negative that it made for a positive's area its uuid.
            name = f"{kinds[i]}.{uuids[i]}"
            key = sampling.key(name, tensors, values, sampling.joint.knows(kinds[i], uuids[i]))
            items.append(Item(share, times, key))
        outputs = sampling.joint.answer(items) or sampling.denoise(items)
        return outputs[0] if parts == 1 else torch.cat(outputs)

    def refuse(self, options: Mapping[str, Any], inputs: dict[str, Any]) -> None:
        """Refuses what would change a local model's result and does not travel; drops what is empty."""
        for name in [name for name, value in inputs.items() if value is None]:
            del inputs[name]
        strange = sorted(set(inputs) - self.family.INPUTS - {"context"})
        if "control" in strange:
            raise _unbuilt("ControlNet", "take it off the conditioning")
        if strange:
            raise _unbuilt(f"the conditioning's {', '.join(strange)}", "leave out the node that sets it")
        patches = [
            name
            for kind in ("patches", "patches_replace")
            for name, value in (options.get(kind) or {}).items()
            if value
        ]
        if patches:
            raise _unbuilt(
                f"patches of the model ({', '.join(patches)})", "leave out the node that sets them"
            )
        unknown = sorted(
            name for name, value in options.items() if name not in OPTIONS and value not in (None, {}, [])
        )
        if unknown:
            raise _unbuilt(f"the model option {', '.join(unknown)}", "leave out the node that sets it")

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """There are no weights here: whoever asks for them would go on with none and not notice."""
        raise _unbuilt(
            "weights in ComfyUI, which stock LoRA loaders, merging and saving need",
            "use Load LoRA (xDiT), or the stock Load Diffusion Model",
        )


def _for_batch(inputs: Mapping[str, torch.Tensor], x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        name: value.to(x.device, x.dtype).expand(x.shape[0], *value.shape[1:])
        for name, value in inputs.items()
    }


def _unbuilt(what: str, works: str) -> XditError:
    return XditError(Code.NOT_BUILT, f"A model loaded by xDiT does not have {what} yet; {works}.")
