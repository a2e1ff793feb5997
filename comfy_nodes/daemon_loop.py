"""The daemon's loop in the place of ComfyUI's: one request for all steps, for samplers that come out the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.patcher_extension
import torch

from xditd.client import Run
from xditd.protocol.errors import Code, XditError

from . import daemon
from .joint import INSIDE, NAME, foreign
from .patcher import remote
from .transformer import RemoteTransformer

Wrappers = comfy.patcher_extension.WrappersMP

LOOPS = ("euler", "heun", "dpmpp_2m", "ddim")
"""Samplers that the daemon has and that give ComfyUI's numbers."""

OF_AN_ENTRY = frozenset({"model_conds", "uuid", "strength"})
"""What a conditioning may carry that changes nothing in how it is applied."""

OF_A_MODEL = frozenset(
    {
        "cross_attn", "pooled_output", "guidance", "conditioning_mt5xl", "attention_mask", "attention_mask_mt5xl", "width",
        "height", "target_width", "target_height", "crop_w", "crop_h", "aspect_ratio",
    }
)  # fmt: skip
"""What ComfyUI's models have made inputs of, and is in `model_conds`."""

OF_A_SAMPLING = (
    "calculate_input",
    "calculate_denoised",
    "noise_scaling",
    "inverse_noise_scaling",
    "timestep",
)
"""What of a model sampling is called within a loop."""

WITHIN_A_STEP = ("sampler_", "model_function", "denoise_mask_function", "context_handler")
"""How the model options begin that are called within a step."""

KINDS = (*INSIDE, Wrappers.PREDICT_NOISE, Wrappers.SAMPLER_SAMPLE)


def in_daemon(model: Any) -> Any:
    """A clone of a MODEL whose sampler runs in the daemon; all around it stays ComfyUI's."""
    clone = model.clone()
    clone.add_wrapper_with_key(Wrappers.SAMPLER_SAMPLE, NAME, _sample)
    return clone


def _sample(
    execute: Any,
    guider: Any,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any],
    callback: Callable[..., None] | None,
    noise: torch.Tensor,
    latent_image: torch.Tensor | None = None,
    denoise_mask: torch.Tensor | None = None,
    disable_pbar: bool = False,
) -> torch.Tensor:
    leaf = remote(guider.model_patcher)
    sampling = leaf.current
    assert sampling is not None  # the outer sampling is ours
    name = _name_of(execute.class_obj)
    options = extra_args["model_options"]
    _refuse(guider, sigmas, options, denoise_mask)
    positive = _put(leaf, sampling, guider, "positive", noise, options)
    guided = not math.isclose(guider.cfg, 1.0)
    negative = _put(leaf, sampling, guider, "negative", noise, options) if guided else None
    shown: list[torch.Tensor] = [torch.zeros_like(noise)]

    def progress(step: int, total: int, sigma: float, x0: torch.Tensor | None) -> None:
        if x0 is not None:
            shown[0] = x0
        if callback is not None:
            callback(step - 1, shown[0], shown[0], total)

    def ask(run: Run) -> torch.Tensor:
        return run.sample(
            noise.float(),
            sigmas.tolist(),
            positive,
            sampler=name,
            negative=negative,
            cfg=guider.cfg,
            latent=latent_image if latent_image is not None and bool(latent_image.any()) else None,
            callback=progress,
            interrupt=daemon.interrupt,
        )

    return sampling.sample(ask).clone().to(noise.device)


def _name_of(sampler: Any) -> str:
    """The name of a KSAMPLER of ComfyUI's, by its function.

    Raises:
        XditError: `bad_value` for one that the daemon has not.
    """
    name = getattr(getattr(sampler, "sampler_function", None), "__name__", "").removeprefix("sample_")
    if name not in LOOPS or getattr(sampler, "extra_options", None):
        raise XditError(
            Code.BAD_VALUE,
            f"The daemon's loop has {', '.join(LOOPS)}; for any other sampler choose loop comfyui, which is as exact.",
        )
    return name


def _refuse(guider: Any, sigmas: torch.Tensor, model_options: dict[str, Any], denoise_mask: Any) -> None:
    """Refuses what would be called within ComfyUI's loop and is not in the daemon's."""
    strange = [name for name in model_options if name.startswith(WITHIN_A_STEP)]
    if denoise_mask is not None:
        strange.append("a noise mask")
    if foreign(model_options, KINDS):
        strange.append("another node's code within a step")
    if not _alike(guider.inner_model.model_sampling, remote(guider.model_patcher), sigmas):
        strange.append("a model sampling other than the family's own")
    if strange:
        raise XditError(
            Code.BAD_VALUE,
            f"The daemon's loop does not have {', '.join(strange)}; choose loop comfyui, which does.",
        )


def _alike(sampling: Any, leaf: RemoteTransformer, sigmas: torch.Tensor) -> bool:
    """Whether a model sampling adds noise, asks and reads the network as the family's own does, at these sigmas."""
    multiplier, own = leaf.family.MULTIPLIER, leaf.model_sampling
    if multiplier is not None:
        is_flow = isinstance(sampling, comfy.model_sampling.CONST)
        return is_flow and torch.equal(sampling.timestep(sigmas), sigmas * multiplier)
    same = all(getattr(type(sampling), name, None) is getattr(type(own), name) for name in OF_A_SAMPLING)
    return same and torch.equal(sampling.log_sigmas.cpu(), own.log_sigmas.cpu())


def _put(
    leaf: Any, sampling: Any, guider: Any, name: str, noise: torch.Tensor, model_options: dict[str, Any]
) -> str:
    """Puts a guider's conditioning, which must be one that holds everywhere and always."""
    entries = guider.conds.get(name) or []
    strange = sorted(
        key
        for entry in entries
        for key, value in entry.items()
        if key not in OF_AN_ENTRY | OF_A_MODEL and value is not None
    )
    if len(entries) != 1 or strange:
        raise XditError(
            Code.BAD_VALUE,
            f"The daemon's loop takes one {name} conditioning without {', '.join(strange) or 'others beside it'}; choose "
            "loop comfyui, which takes all.",
        )
    inputs = {
        key: value.process_cond(batch_size=noise.shape[0], area=None).cond
        for key, value in entries[0]["model_conds"].items()
    }
    inputs["context"] = inputs.pop("c_crossattn", None)
    leaf.refuse(model_options.get("transformer_options", {}), inputs)
    cast = {
        key: None if value is None else comfy.model_management.cast_to_device(value, value.device, leaf.dtype)
        for key, value in inputs.items()
    }
    tensors, values = leaf.family.conditioning(cast, leaf.info)
    return str(sampling.key(name, tensors, values, known=False))
