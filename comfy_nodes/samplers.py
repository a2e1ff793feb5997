"""KSampler and KSampler Advanced (xDiT Multi-GPU): the stock nodes' inputs, and their own function underneath."""

from __future__ import annotations

import time
from typing import Any

import comfy.samplers
import nodes
from comfy_api.latest import io

from xditd.protocol.errors import Code, XditError

from .daemon_loop import LOOPS, in_daemon
from .dispatcher import Dispatcher
from .loaders import DispatcherType
from .patcher import remote
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
                f"for {', '.join(LOOPS)} without a mask, with less between two steps."
            ),
        ),
    ]


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
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the noise.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="How many steps."),
                io.Float.Input(
                    "cfg",
                    default=8.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance scale; 1 for Flux.",
                ),
                io.Combo.Input(
                    "sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="The sampler."
                ),
                io.Combo.Input(
                    "scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="The schedule of sigmas."
                ),
                io.Conditioning.Input("positive", tooltip="What the image shall show."),
                io.Conditioning.Input("negative", tooltip="What it shall not; unused where cfg is 1."),
                io.Latent.Input("latent_image", tooltip="The latent to denoise."),
                io.Float.Input(
                    "denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="How much of it to redo."
                ),
                *_ours(),
            ],
            outputs=[io.Latent.Output(tooltip="The denoised latent.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive: Any,
        negative: Any,
        latent_image: Any,
        denoise: float,
        dispatcher: Dispatcher,
        loop: str = "comfyui",
    ) -> io.NodeOutput:
        return _sample(
            model,
            dispatcher,
            loop,
            seed,
            steps,
            cfg,
            sampler_name,
            scheduler,
            positive,
            negative,
            latent_image,
            denoise=denoise,
        )


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
                io.Int.Input(
                    "noise_seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Of the noise.",
                ),
                io.Int.Input(
                    "steps", default=20, min=1, max=10000, tooltip="How many steps the schedule has."
                ),
                io.Float.Input(
                    "cfg",
                    default=8.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance scale; 1 for Flux.",
                ),
                io.Combo.Input(
                    "sampler_name", options=comfy.samplers.KSampler.SAMPLERS, tooltip="The sampler."
                ),
                io.Combo.Input(
                    "scheduler", options=comfy.samplers.KSampler.SCHEDULERS, tooltip="The schedule of sigmas."
                ),
                io.Conditioning.Input("positive", tooltip="What the image shall show."),
                io.Conditioning.Input("negative", tooltip="What it shall not; unused where cfg is 1."),
                io.Latent.Input("latent_image", tooltip="The latent to denoise."),
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
        model: Any,
        add_noise: str,
        noise_seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        positive: Any,
        negative: Any,
        latent_image: Any,
        start_at_step: int,
        end_at_step: int,
        return_with_leftover_noise: str,
        dispatcher: Dispatcher,
        loop: str = "comfyui",
    ) -> io.NodeOutput:
        return _sample(
            model,
            dispatcher,
            loop,
            noise_seed,
            steps,
            cfg,
            sampler_name,
            scheduler,
            positive,
            negative,
            latent_image,
            disable_noise=add_noise == "disable",
            start_step=start_at_step,
            last_step=end_at_step,
            force_full_denoise=return_with_leftover_noise == "disable",
        )


NODES = [KSampler, KSamplerAdvanced]


@telling_refusals()
def _sample(model: Any, dispatcher: Dispatcher, loop: str, *arguments: Any, **named: Any) -> io.NodeOutput:
    leaf = remote(model)
    if leaf.dispatcher != dispatcher:
        raise XditError(
            Code.BAD_VALUE,
            f"This MODEL is {leaf.dispatcher.model.name} and this XDIT_DISPATCHER {dispatcher.model.name}, or their "
            "choices differ; connect both from the same loader.",
        )
    begin = time.perf_counter()
    sampled = nodes.common_ksampler(in_daemon(model) if loop == "daemon" else model, *arguments, **named)
    say(f"{leaf.verdict()} in {time.perf_counter() - begin:.1f} s")
    return io.NodeOutput(*sampled)
