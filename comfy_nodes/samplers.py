"""KSampler and KSampler Advanced (xDiT Multi-GPU): the stock nodes' inputs, and their own function underneath."""

from __future__ import annotations

import time
from typing import Any

import comfy.samplers
import nodes
from comfy_api.latest import io

from .daemon_loop import LOOPS, in_daemon
from .loaders import DispatcherType
from .patcher import check_same, remote
from .say import say, telling_refusals

CATEGORY = "xDiT/sampling"


def _ours() -> list[Any]:
    return [
        DispatcherType.Input("dispatcher", tooltip="From the loader that the MODEL comes from."),
        io.Combo.Input(
            "loop",
            options=["comfyui", "daemon"],
            default="comfyui",
            optional=True,
            tooltip=(
                "Who goes through the steps. comfyui: any sampler, mask and guider, exactly as stock. daemon: the same "
                f"for {', '.join(LOOPS)} without a mask, with less between two steps; always so with PipeFusion."
            ),
        ),
    ]


def _seed(name: str) -> Any:
    return io.Int.Input(
        name, default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=True, tooltip="Of the noise."
    )


def _sampling(steps: str) -> list[Any]:
    """What both stock nodes ask, between the seed and what is their own.

    Args:
        steps: tooltip of the input of that name.
    """
    samplers, schedulers = comfy.samplers.KSampler.SAMPLERS, comfy.samplers.KSampler.SCHEDULERS
    scale = "Guidance scale; 1 for Flux."
    return [
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip=steps),
        io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=scale),
        io.Combo.Input("sampler_name", options=samplers, tooltip="The sampler."),
        io.Combo.Input("scheduler", options=schedulers, tooltip="The schedule of sigmas."),
        io.Conditioning.Input("positive", tooltip="What the image shall show."),
        io.Conditioning.Input("negative", tooltip="What it shall not; unused where cfg is 1."),
        io.Latent.Input("latent_image", tooltip="The latent to denoise."),
    ]


SHARED = ("steps", "cfg", "sampler_name", "scheduler", "positive", "negative", "latent_image")
"""Names of `_sampling`'s inputs, in the order in which ComfyUI's own function takes them."""


class KSampler(io.ComfyNode):
    """The stock KSampler on a model in the daemon."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="XDiTKSampler",
            display_name="KSampler (xDiT Multi-GPU)",
            category=CATEGORY,
            description="Denoises a latent with a model in the xDiT daemon: the latent of the stock KSampler.",
            inputs=[
                io.Model.Input("model", tooltip="From an xDiT loader."),
                _seed("seed"),
                *_sampling("How many steps."),
                io.Float.Input(
                    "denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="How much of it to redo."
                ),
                *_ours(),
            ],
            outputs=[io.Latent.Output(tooltip="The denoised latent.")],
        )

    @classmethod
    def execute(cls, seed: int, denoise: float, **inputs: Any) -> io.NodeOutput:
        return _sample(inputs, seed, denoise=denoise)


class KSamplerAdvanced(io.ComfyNode):
    """The stock KSampler (Advanced) on a model in the daemon."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="XDiTKSamplerAdvanced",
            display_name="KSampler Advanced (xDiT Multi-GPU)",
            category=CATEGORY,
            description="Some steps of a schedule, with a model in the xDiT daemon: the latent of the stock node.",
            inputs=[
                io.Model.Input("model", tooltip="From an xDiT loader."),
                io.Combo.Input(
                    "add_noise", options=["enable", "disable"], tooltip="Whether to begin with noise."
                ),
                _seed("noise_seed"),
                *_sampling("How many steps the schedule has."),
                io.Int.Input("start_at_step", default=0, min=0, max=10000, tooltip="The first step to do."),
                io.Int.Input(
                    "end_at_step", default=10000, min=0, max=10000, tooltip="The step to stop before."
                ),
                io.Combo.Input(
                    "return_with_leftover_noise",
                    options=["disable", "enable"],
                    tooltip="Whether the noise of steps that were not done stays in.",
                ),
                *_ours(),
            ],
            outputs=[io.Latent.Output(tooltip="The denoised latent.")],
        )

    @classmethod
    def execute(
        cls,
        add_noise: str,
        noise_seed: int,
        start_at_step: int,
        end_at_step: int,
        return_with_leftover_noise: str,
        **inputs: Any,
    ) -> io.NodeOutput:
        return _sample(
            inputs,
            noise_seed,
            disable_noise=add_noise == "disable",
            start_step=start_at_step,
            last_step=end_at_step,
            force_full_denoise=return_with_leftover_noise == "disable",
        )


NODES = [KSampler, KSamplerAdvanced]


@telling_refusals()
def _sample(inputs: dict[str, Any], seed: int, **named: Any) -> io.NodeOutput:
    model, dispatcher = inputs["model"], inputs["dispatcher"]
    leaf = remote(model)
    check_same(model, dispatcher)
    pipelined = dispatcher.plan.strategy == "PipeFusion"
    if pipelined or inputs.get("loop") == "daemon":
        model = in_daemon(model)
    begin = time.perf_counter()
    sampled = nodes.common_ksampler(model, seed, *(inputs[name] for name in SHARED), **named)
    how = "; steps overlap, so the loop is the daemon's" if pipelined else ""
    say(f"{leaf.verdict()} in {time.perf_counter() - begin:.1f} s{how}")
    return io.NodeOutput(*sampled)
