"""The loader nodes: stock inputs first, then which devices, how, and where the daemon is."""

from __future__ import annotations

import functools
import os
from typing import Any

import folder_paths
from comfy_api.latest import io

from xditd.client import folders
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import Loaded, ModelRef, PlanRequest

from . import daemon, dispatcher, freeing
from .clip import make_clip
from .dispatcher import (
    SCHEDULINGS,
    STRATEGIES,
    WEIGHT_DTYPES,
    Dispatcher,
    device_names,
    refuse_unbuilt,
)
from .families import family
from .patcher import make_model, remote
from .say import say, telling_refusals
from .vae import RemoteVAE, missing_vae

CATEGORY = "xDiT/loaders"
DispatcherType = io.Custom("XDIT_DISPATCHER")

ENDPOINT = (
    "Where the daemon listens: ipc:///path.sock or tcp://host:port. Empty: the user's, else the system's."
)
SHARING = "Which device runs it: a number, as in 0; several, as in 0,1, share each picture. Empty: the daemon chooses one."
ONE_DEVICE = "Which device runs it: a number, as in 0. Empty: the daemon chooses."


def _choices() -> list[Any]:
    """What a loader of a diffusion model asks beyond the stock one."""
    return [
        io.String.Input(
            "gpu_devices",
            default="",
            optional=True,
            tooltip="Which devices of the daemon, as in 0,1,2,3. Empty: all that it owns.",
        ),
        io.Int.Input(
            "replicas",
            default=1,
            min=1,
            max=8,
            optional=True,
            tooltip="How many copies of the model share the work, each on its share of gpu_devices.",
        ),
        io.Combo.Input(
            "strategy",
            options=list(STRATEGIES),
            default="auto",
            optional=True,
            tooltip="How the devices share one image. auto, Hybrid, USP, CFG and Tensor are exact: the image of one GPU. PipeFusion, for Flux, SD3, PixArt and HunyuanDiT, is not quite.",
        ),
        io.Boolean.Input(
            "allow_approximate",
            default=False,
            optional=True,
            tooltip="Whether auto and Hybrid may choose what is faster and not quite the same image.",
        ),
        io.Combo.Input(
            "scheduling",
            options=list(SCHEDULINGS),
            default=SCHEDULINGS[0],
            optional=True,
            tooltip="Which replica takes the next image: in turn, the least loaded, a faster one more often, or the first to be done.",
        ),
        io.Boolean.Input(
            "fallback",
            default=False,
            optional=True,
            tooltip="Whether fewer devices do it where the plan cannot be had: a true result, and said aloud.",
        ),
        io.String.Input("endpoint", default="", optional=True, tooltip=ENDPOINT),
    ]


def _device_choices(tooltip: str = ONE_DEVICE) -> list[Any]:
    """What a loader of a model that takes one device by itself asks beyond the stock one."""
    return [
        io.String.Input("gpu_devices", default="", optional=True, tooltip=tooltip),
        io.String.Input("endpoint", default="", optional=True, tooltip=ENDPOINT),
    ]


class LoadCheckpoint(io.ComfyNode):
    """A checkpoint's transformer, text encoders and VAE, each a model of its own in the daemon."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="XDiTCheckpointLoader",
            display_name="Load Checkpoint (xDiT Multi-GPU)",
            category=CATEGORY,
            description="Loads a checkpoint in the xDiT daemon, its diffusion model over several GPUs.",
            inputs=[
                io.Combo.Input(
                    "ckpt_name",
                    options=_listed("checkpoints"),
                    tooltip="The name of the checkpoint, a .safetensors file or a folder that the daemon sees too.",
                ),
                *_choices(),
            ],
            outputs=[
                io.Model.Output(),
                io.Clip.Output(),
                io.Vae.Output(),
                DispatcherType.Output(display_name="XDIT_DISPATCHER"),
            ],
        )

    @classmethod
    @telling_refusals()
    def execute(cls, ckpt_name: str, **choices: Any) -> io.NodeOutput:
        spec = _dispatcher("checkpoints", ckpt_name, choices)
        loaded = _load(spec)
        kind = family(loaded.model)
        encoders = [(part, found) for name in kind.ENCODERS if (found := _part(part := spec.part(name)))]
        clip = make_clip(kind.CLIP, [(part, found.model) for part, found in encoders]) if encoders else None
        vae = _part(part := spec.part("vae"))
        _done(
            spec,
            loaded,
            "" if clip else "; no text encoders in it that it loads",
            "" if vae else "; no VAE in it",
        )
        model = make_model(spec, loaded)
        if clip is not None and kind.BARE:
            remote(model).empty_prompt = functools.cache(lambda: _empty_prompt(clip))
        return io.NodeOutput(model, clip, RemoteVAE(part, vae.model) if vae else missing_vae(), spec)


class LoadUNet(io.ComfyNode):
    """A diffusion model alone."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="XDiTUNETLoader",
            display_name="Load UNet (xDiT Multi-GPU)",
            category=CATEGORY,
            description="Loads a diffusion model in the xDiT daemon, over several GPUs.",
            inputs=[
                io.Combo.Input("unet_name", options=_listed("diffusion_models")),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    tooltip="fp8_e4m3fn and fp8_e5m2 round all weights to fp8 and keep them so: half the memory of 16 bits. Each layer is "
                    "cast to the model's dtype as it runs. fp8_e4m3fn_fast is not built. default: as the file has it; of a file in "
                    "fp8, whose weights are converted, or stay in fp8 where memory lacks: the same image.",
                ),
                *_choices(),
            ],
            outputs=[io.Model.Output(), DispatcherType.Output(display_name="XDIT_DISPATCHER")],
        )

    @classmethod
    @telling_refusals()
    def execute(cls, unet_name: str, weight_dtype: str, **choices: Any) -> io.NodeOutput:
        kept = dispatcher.weight_dtype(weight_dtype)
        spec = _dispatcher("diffusion_models", unet_name, choices | {"weight_dtype": kept})
        loaded = _load(spec)
        _done(spec, loaded)
        return io.NodeOutput(make_model(spec, loaded), spec)


class LoadVAE(io.ComfyNode):
    """A VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="XDiTVAELoader",
            display_name="Load VAE (xDiT)",
            category=CATEGORY,
            description="Loads a VAE in the xDiT daemon. The stock VAE Decode, Encode and their tiled twins take it.",
            inputs=[
                io.Combo.Input("vae_name", options=_listed("vae")),
                *_device_choices(SHARING),
            ],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    @telling_refusals()
    def execute(cls, vae_name: str, **choices: Any) -> io.NodeOutput:
        spec = _dispatcher("vae", vae_name, choices)
        loaded = _load(spec)
        _done(spec, loaded)
        return io.NodeOutput(RemoteVAE(spec, loaded.model))


def _clip_loader(
    node_id: str, display_name: str, names: tuple[str, ...], types: tuple[str, ...], asks: bool = True
) -> type[io.ComfyNode]:
    """A loader of one, two or three text encoders.

    Args:
        names: of its inputs for encoders.
        types: that so many files can make.
        asks: whether it has the stock loader's inputs type and device.
    """

    class LoadCLIP(io.ComfyNode):
        @classmethod
        def define_schema(cls) -> io.Schema:
            encoders = _listed("text_encoders")
            chosen = (
                []
                if not asks
                else [
                    io.Combo.Input("type", options=list(types), tooltip="Of the model that the text is for.")
                ]
            )
            stock = (
                []
                if not asks
                else [
                    io.Combo.Input(
                        "device",
                        options=["default", "cpu"],
                        optional=True,
                        tooltip="default: a device of the daemon. cpu is not built yet: the daemon owns the devices.",
                    )
                ]
            )
            return io.Schema(
                node_id=node_id,
                display_name=display_name,
                category=CATEGORY,
                description="Loads text encoders in the xDiT daemon. The stock CLIP Text Encode nodes take them.",
                inputs=[
                    *(io.Combo.Input(name, options=encoders) for name in names),
                    *chosen,
                    *stock,
                    *_device_choices(),
                ],
                outputs=[io.Clip.Output()],
            )

        @classmethod
        @telling_refusals()
        def execute(cls, type: str = types[0], device: str = "default", **choices: Any) -> io.NodeOutput:
            if device != "default":
                raise XditError(
                    Code.NOT_BUILT,
                    f"device {device} is not built yet: the daemon owns the devices; choose default and set gpu_devices.",
                )
            specs = [_dispatcher("text_encoders", choices.pop(name), choices) for name in names]
            loaded = [_load(spec) for spec in specs]
            clip = make_clip(type, [(spec, each.model) for spec, each in zip(specs, loaded, strict=True)])
            lines = [_how(spec, each) for spec, each in zip(specs, loaded, strict=True)]
            say(f"✅ {'; '.join(lines)}")
            return io.NodeOutput(clip)

    LoadCLIP.__name__ = LoadCLIP.__qualname__ = node_id
    return LoadCLIP


LoadCLIP = _clip_loader("XDiTCLIPLoader", "Load CLIP (xDiT)", ("clip_name",), ("sd3", "pixart"))
LoadDualCLIP = _clip_loader(
    "XDiTDualCLIPLoader",
    "Load Dual CLIP (xDiT)",
    ("clip_name1", "clip_name2"),
    ("flux", "sd3", "sdxl", "hunyuan_dit"),
)
LoadTripleCLIP = _clip_loader(
    "XDiTTripleCLIPLoader",
    "Load Triple CLIP (xDiT)",
    ("clip_name1", "clip_name2", "clip_name3"),
    ("sd3",),
    asks=False,
)

NODES = [LoadCheckpoint, LoadUNet, LoadVAE, LoadCLIP, LoadDualCLIP, LoadTripleCLIP]


GGUF = "xdit_gguf"
"""A kind of ours in ComfyUI's table: it lists no GGUF files on its own."""


def _listed(kind: str) -> list[str]:
    """What the daemon may load of a kind: the files that ComfyUI lists, GGUF files beside them, and folders that are one model.

    The daemon is not asked: it may be away while ComfyUI makes its lists.
    """
    roots = folder_paths.get_folder_paths(kind)
    files = folder_paths.get_filename_list(kind)
    found = folders.offered(kind, roots, files)
    if kind != "diffusion_models":
        return [*files, *found]
    folder_paths.folder_names_and_paths[GGUF] = (list(roots), {".gguf"})
    return [*files, *folder_paths.get_filename_list(GGUF), *found]


def _plan(choices: dict[str, Any]) -> PlanRequest:
    strategy = choices.get("strategy") or STRATEGIES[0]
    scheduling = choices.get("scheduling") or SCHEDULINGS[0]
    refuse_unbuilt(
        strategy=strategy,
        scheduling=scheduling,
        allow_approximate=bool(choices.get("allow_approximate")),
    )
    devices = device_names(choices.get("gpu_devices") or "")
    replicas = choices.get("replicas") or 1
    return PlanRequest(
        strategy=strategy,
        devices=devices,
        replicas=replicas,
        scheduling=scheduling,
        weight_dtype=choices.get("weight_dtype") or "",
        fallback="auto" if choices.get("fallback") else "never",
    )


def _dispatcher(kind: str, name: str, choices: dict[str, Any]) -> Dispatcher:
    ref = ModelRef(kind=kind, name=name.replace(os.sep, "/"), size=_size(kind, name))
    return Dispatcher((choices.get("endpoint") or "").strip(), ref, _plan(choices))


def _size(kind: str, name: str) -> int:
    """Of a file or a folder, in bytes: by it the daemon tells whether it sees the same."""
    folder = folders.find(kind, folder_paths.get_folder_paths(kind), name)
    if folder is not None:
        return folders.size(kind, folder)
    return os.path.getsize(folder_paths.get_full_path_or_raise(kind, name))


def _load(spec: Dispatcher) -> Loaded:
    """Has the daemon load it, or finds it warm."""
    loaded = daemon.client(spec.endpoint).load(
        spec.model, spec.plan, on_event=daemon.telling(spec.model.name), interrupt=daemon.interrupt
    )
    freeing.used(spec)
    return loaded


def _part(spec: Dispatcher) -> Loaded | None:
    """A part of a checkpoint; None where the file has no such part."""
    try:
        return _load(spec)
    except XditError as error:
        if error.code == Code.UNKNOWN_FAMILY:
            return None
        raise


def _empty_prompt(clip: Any) -> dict[str, Any]:
    """What a diffusion model is called with for an empty prompt."""
    context, pooled = clip.encode_from_tokens(clip.tokenize(""), return_pooled=True)
    return {"context": context, "y": pooled}


def _done(spec: Dispatcher, loaded: Loaded, *lacks: str) -> None:
    degraded = f"; degraded: {loaded.degraded}" if loaded.degraded else ""
    lack = "".join([*lacks, degraded, *(f"; {warning}" for warning in loaded.warnings)])
    say(f"{'⚠️' if lack else '✅'} {_how(spec, loaded)}{lack}")


def _how(spec: Dispatcher, loaded: Loaded) -> str:
    how = "was warm" if loaded.warm else f"loaded in {loaded.seconds:.1f} s"
    more = f" and {len(loaded.groups) - 1} replicas more" if len(loaded.groups) > 1 else ""
    return f"{spec.model.name} {how} on {', '.join(loaded.plan.devices)}{more}"
