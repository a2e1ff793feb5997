"""The MODEL: ComfyUI's model of the family around a leaf that is elsewhere, and refusals where weights are needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import torch

from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import Loaded
from xditd.protocol.plans import LoraRef

from .dispatcher import Dispatcher
from .families import family
from .joint import NAME
from .transformer import LORA, RemoteTransformer

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class RemotePatcher(comfy.model_patcher.ModelPatcher):
    """A ModelPatcher of a model without weights. What would patch them is refused, never ignored."""

    def add_patches(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise _refusal("a stock LoRA loader", "use Load LoRA (xDiT) instead")

    def add_hook_patches(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise _refusal("a LoRA hook", "use Load LoRA (xDiT), which holds for a whole sampling")

    def add_weight_wrapper(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise _refusal("a weight wrapper", "leave out the node that sets it")

    def set_injections(self, key: str, injections: Any) -> None:
        if injections:
            raise _refusal(f"the injection {key}", "leave out the node that sets it")

    def set_model_patch(self, patch: Any, name: str) -> NoReturn:
        raise _refusal(f"the patch {name}", "leave out the node that sets it")

    def set_model_patch_replace(self, patch: Any, name: str, *args: Any, **kwargs: Any) -> NoReturn:
        raise _refusal(f"the patch {name}", "leave out the node that sets it")

    def set_model_compute_dtype(self, dtype: Any) -> NoReturn:
        raise _refusal(
            "another compute dtype", "the daemon computes in the one that it loaded the model with"
        )

    def add_object_patch(self, name: str, obj: Any) -> None:
        if name.startswith("diffusion_model"):
            raise _refusal(f"a patch of {name}", "leave out the node that sets it")
        super().add_object_patch(name, obj)


def make_model(dispatcher: Dispatcher, loaded: Loaded) -> RemotePatcher:
    """The MODEL of a model that the daemon has ready."""
    dtype = DTYPES[loaded.dtype]
    config = family(loaded.model).comfy_config(loaded.model)
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "")
    leaf = model.diffusion_model = RemoteTransformer(dispatcher, loaded.model, dtype)
    leaf.model_sampling = model.model_sampling
    model.memory_required = _nothing  # ComfyUI splits no batch for want of its own memory
    model.eval()
    # Where ComfyUI has a GPU, its loop and its noise are on it, as they are with a local model.
    patcher = RemotePatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
        size=1,
    )
    kinds = comfy.patcher_extension.WrappersMP

    def outer_sample(execute: Any, *arguments: Any, **named: Any) -> Any:
        with leaf.sampling(lora_of(execute.class_obj.model_options)):
            return execute(*arguments, **named)

    def calc_cond_batch(execute: Any, *arguments: Any) -> Any:
        sampling = leaf.current
        return execute(*arguments) if sampling is None else sampling.joint.step(execute, arguments)

    patcher.add_wrapper_with_key(kinds.OUTER_SAMPLE, NAME, outer_sample)
    patcher.add_wrapper_with_key(kinds.CALC_COND_BATCH, NAME, calc_cond_batch)
    return patcher


def remote(model: Any) -> RemoteTransformer:
    """The leaf of a MODEL.

    Raises:
        XditError: `bad_value` for a MODEL that no xDiT loader made.
    """
    leaf = getattr(getattr(model, "model", None), "diffusion_model", None)
    if not isinstance(leaf, RemoteTransformer):
        raise XditError(
            Code.BAD_VALUE,
            "This MODEL was not loaded by xDiT; connect that of Load UNet or Load Checkpoint (xDiT Multi-GPU).",
        )
    return leaf


def wish(model: Any) -> Dispatcher:
    """What a MODEL asks of the daemon: its loader's choices, and the LoRAs that were added since.

    Raises:
        XditError: `bad_value` for a MODEL that no xDiT loader made.
    """
    return replace(remote(model).dispatcher, lora=lora_of(model.model_options))


def check_same(model: Any, dispatcher: Dispatcher) -> None:
    """Refuses a MODEL and an XDIT_DISPATCHER that are not from the same node.

    Raises:
        XditError: `bad_value`.
    """
    wished = wish(model)
    if wished != dispatcher:
        raise XditError(
            Code.BAD_VALUE,
            f"This MODEL is {wished.model.name} and this XDIT_DISPATCHER {dispatcher.model.name}, or their choices or LoRAs "
            "differ; connect both from the same loader or Load LoRA (xDiT).",
        )


def with_loras(model: Any, lora: tuple[LoraRef, ...]) -> Any:
    """A clone of a MODEL whose samplings have these LoRAs; all else that was set on it stays."""
    clone = model.clone()
    clone.model_options["transformer_options"][LORA] = lora
    return clone


def lora_of(model_options: Mapping[str, Any]) -> tuple[LoraRef, ...]:
    """The LoRAs of a MODEL by its options."""
    found: tuple[LoraRef, ...] = model_options.get("transformer_options", {}).get(LORA, ())
    return found


def _nothing(*args: Any, **kwargs: Any) -> int:
    return 0


def _refusal(what: str, works: str) -> XditError:
    return XditError(
        Code.NOT_BUILT,
        f"A model loaded by xDiT does not take {what}: its weights are in the daemon; {works}.",
    )
