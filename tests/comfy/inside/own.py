"""ComfyUI's own model with the weights of a file: what xditd is compared with. Run inside ComfyUI's environment."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch


def enter() -> None:
    """Makes ComfyUI importable, on the CPU, without its server and without its command line."""
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    torch.set_grad_enabled(False)


def flux(path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> Any:
    """ComfyUI's Flux module, built from the shapes of the file and given its weights; in fp8 it casts each layer."""
    import comfy.ldm.flux.model
    import comfy.ops
    from safetensors.torch import load_file

    weights = load_file(path)
    width, columns = weights["img_in.weight"].shape
    head_dim = weights["double_blocks.0.img_attn.norm.key_norm.scale"].shape[0]
    newer = {"txt_ids_dims": []} if "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__annotations__ else {}
    module = comfy.ldm.flux.model.Flux(
        in_channels=columns // 4,
        out_channels=columns // 4,
        patch_size=2,
        vec_in_dim=weights["vector_in.in_layer.weight"].shape[1],
        context_in_dim=weights["txt_in.weight"].shape[1],
        hidden_size=width,
        mlp_ratio=4.0,
        num_heads=width // head_dim,
        depth=sum(key.endswith("img_mod.lin.weight") for key in weights),
        depth_single_blocks=sum(key.endswith("linear2.weight") for key in weights),
        axes_dim=[head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16],
        theta=10000,
        qkv_bias=True,
        guidance_embed=any(key.startswith("guidance_in") for key in weights),
        dtype=dtype,
        device="cpu",
        operations=comfy.ops.disable_weight_init if dtype.itemsize > 1 else comfy.ops.manual_cast,
        **newer,
    )
    ours = module.state_dict()
    renamed = {key if key in ours else _renamed(key): value.to(dtype) for key, value in weights.items()}
    module.load_state_dict(renamed, strict=True)
    return module.eval()


def model(path: str | os.PathLike[str], leaf: Any = None) -> Any:
    """A MODEL as ComfyUI's loader makes it, of ComfyUI's Flux or of another leaf."""
    import comfy.model_patcher
    import comfy.supported_models

    leaf = leaf or flux(path)
    settings = {
        "image_model": "flux",
        "in_channels": leaf.in_channels,
        "out_channels": leaf.out_channels,
        "guidance_embed": leaf.params.guidance_embed,
        "disable_unet_model_creation": True,
    }
    config = comfy.supported_models.Flux(settings)
    _compute_in_float32(config, leaf.dtype)
    base = config.get_model({}, "")
    base.diffusion_model = leaf
    base.memory_required = lambda *args, **kwargs: 0  # as many entries in one call as ComfyUI ever takes
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(base, load_device=cpu, offload_device=cpu)


def _compute_in_float32(config: Any, dtype: torch.dtype) -> None:
    """Has a model keep its weights in a dtype, as a loader's weight_dtype does."""
    config.set_inference_dtype(dtype, torch.float32 if dtype.itemsize == 1 else None)


def whole(path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> Any:
    """A MODEL as ComfyUI's loader makes it of a file, in float32, by its own detection. `dtype`: of its weights."""
    import comfy.model_detection
    from safetensors.torch import load_file

    weights = load_file(path)
    return _made(comfy.model_detection.model_config_from_unet(weights, ""), weights, dtype)


def below(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """What a file has below a prefix, without it."""
    return {key[len(prefix) :]: value for key, value in weights.items() if key.startswith(prefix)}


def sdxl(path: str | os.PathLike[str], prefix: str = "", dtype: torch.dtype = torch.float32) -> Any:
    """The same of an SDXL below a prefix, of any width: ComfyUI detects only the real one's."""
    import comfy.model_detection
    import comfy.supported_models
    from safetensors.torch import load_file

    weights = below(load_file(path), prefix)
    config = comfy.model_detection.detect_unet_config(weights, "")
    config |= {"num_heads": -1, "num_head_channels": 64}
    return _made(comfy.supported_models.SDXL(config), weights, dtype)


def hunyuandit(path: str | os.PathLike[str], prefix: str = "", dtype: torch.dtype = torch.float32) -> Any:
    """The same of a HunyuanDiT below a prefix, of any width: ComfyUI knows a 1.1, and what texts have, by the real ones'."""
    import comfy.model_detection
    import comfy.supported_models
    from safetensors.torch import load_file

    weights = below(load_file(path), prefix)
    config = comfy.model_detection.detect_unet_config(weights, "")
    config["text_states_dim"], _ = weights["mlp_t5.2.weight"].shape
    _, config["text_states_dim_t5"] = weights["mlp_t5.0.weight"].shape
    if "style_embedder.weight" not in weights:
        return _made(comfy.supported_models.HunyuanDiT(config), weights, dtype)
    config |= {"image_model": "hydit1", "size_cond": True, "use_style_cond": True}
    return _made(comfy.supported_models.HunyuanDiT1(config), weights, dtype)


def _made(config: Any, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    import comfy.model_patcher

    _compute_in_float32(config, dtype)
    base = config.get_model(weights, "")
    base.load_model_weights(weights, "")
    base.memory_required = lambda *args, **kwargs: 0
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(base.eval(), load_device=cpu, offload_device=cpu)


def module(family: str, path: str | os.PathLike[str]) -> Any:
    """ComfyUI's module of a family, with the weights of a file."""
    if family == "flux":
        return flux(path)
    return known(family, path).model.diffusion_model


def known(family: str, path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> Any:
    """A MODEL of a file of a family beside Flux, made by ComfyUI's own detection as far as that goes."""
    ways = {"sdxl": sdxl, "hunyuandit": hunyuandit}
    return ways.get(family, whole)(path, dtype=dtype)


def _renamed(key: str) -> str:
    """Newer ComfyUI keeps RMSNorm's scale under `weight`."""
    return key.removesuffix(".scale") + ".weight"
