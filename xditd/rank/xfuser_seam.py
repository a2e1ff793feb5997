"""All that this program knows of xfuser: joining a world, and running a transformer of it. Made for VERSION only.

xfuser 0.7.0 takes a GPU for granted, imports every pipeline it has, and holds K and V of each layer after use. What
is changed, each attribute by name so that a test can tell when a new version moves it:

- `xfuser`, `xfuser.core` and `xfuser.model_executor.models.transformers` are entered without running their
  `__init__`, which import all families (and transformers): a rank starts 3 seconds sooner.
- `xfuser.envs`: on a CPU the device is "cpu" and the backend gloo, also where torch was built with CUDA.
- `PROCESS_GROUP` in `layers.usp`, which stays None without a GPU.
- `usp._get_attention_function`: leaves the pads out of K and V, see `rank.shards`. xfuser itself has no masks here:
  with a text length that the degree does not divide its Flux is silently wrong.
- `usp._has_kv_cache`: no. Only PipeFusion reads that cache; filled, it pins two tensors a layer.
- `xFuserJointAttnProcessor2_0`: without a text (SD3.5 medium attends to the image alone, too) it raises
  UnboundLocalError; that attention is done here.
- `USP` of `attention_processor` and `transformer_flux`, where layers are compiled: ranks meet in it, so it is left as it is.
- `ATTENTION_FUNCTION_REGISTRY`: flash attention of a CPU; and the memory-efficient kernel without the pads in
  its log-sum-exp, which ring attention cannot merge.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from xditd.protocol.errors import Code, XditError

VERSION = "0.7.0"

BARE = ("xfuser", "xfuser.core", "xfuser.model_executor.models.transformers")
"""Packages that are entered without running their `__init__`."""

PATCHED = {
    "xfuser.envs": (
        "_is_cuda", "_is_hip", "get_device_version", "get_torch_distributed_backend", "PACKAGES_CHECKER",
    ),
    "xfuser.model_executor.layers.usp": (
        "PROCESS_GROUP", "_get_attention_function", "_has_kv_cache", "ATTENTION_FUNCTION_REGISTRY",
    ),
    "xfuser.model_executor.layers.attention_processor": ("USP", "xFuserJointAttnProcessor2_0"),
    "xfuser.model_executor.models.transformers.transformer_flux": ("USP",),
}  # fmt: skip
"""By module, the attributes that are replaced or changed here."""

WRAPPERS = {
    "FluxTransformer2DModel": "transformer_flux",
    "HunyuanDiT2DModel": "hunyuan_transformer_2d",
    "PixArtTransformer2DModel": "pixart_transformer_2d",
    "SD3Transformer2DModel": "transformer_sd3",
}
"""By diffusers' class: xfuser's module that wraps it."""

Attend = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


class World:
    """This rank's place in a sequence-parallel world. One in a process: xfuser keeps its state in modules."""

    def __init__(self, ulysses: int, ring: int, attention: str, group: Any, groups: int = 1) -> None:
        self.groups = groups
        self.ulysses = ulysses
        self.ring = ring
        self.rank: int = group.rank_in_group
        self._attention = attention
        self._group = group

    def wrap(self, backbone: nn.Module, heads: int) -> nn.Module:
        """xfuser's wrapper around a transformer. It takes this rank's tokens and returns them.

        Raises:
            XditError: `bad_plan` where ulysses does not divide the heads, `not_built` for a transformer that is not
                in WRAPPERS.
        """
        kind = type(backbone).__name__
        if kind not in WRAPPERS:
            raise XditError(Code.NOT_BUILT, f"A {kind} runs on one device in this version.")
        if heads % self.ulysses:
            raise XditError(
                Code.BAD_PLAN,
                f"ulysses {self.ulysses} does not divide the model's {heads} heads; ring takes any degree.",
            )
        _start_runtime(self.ulysses, self.ring, self.groups, heads, self._attention)
        importlib.import_module(f"{BARE[2]}.{WRAPPERS[kind]}")
        _patch_processors(importlib.import_module("xfuser.model_executor.layers.attention_processor"))
        register = importlib.import_module(f"{BARE[2]}.register")
        wrapper: nn.Module = register.xFuserTransformerWrappersRegister.get_wrapper(backbone)(backbone)
        return wrapper

    def gather(self, tokens: torch.Tensor) -> torch.Tensor:
        """All ranks' tokens [B, n, C], one rank's after another's: [B, degree·n, C]."""
        gathered: torch.Tensor = self._group.all_gather(tokens.contiguous(), dim=1)
        return gathered

    def keep(self, blocks: Sequence[Mapping[int, torch.Tensor]]) -> None:
        """From now on attention sees, of each ring rank's block, certain positions only.

        Args:
            blocks: by ring rank and by the length of a block, these positions; of any other block, all.
        """
        _kept.blocks = tuple(blocks) if any(blocks) else ()

    def set_tokens(self, count: int) -> None:
        """From now on a call has so many image tokens of its own. xfuser's forwards of latents ask its runtime state for
        their height and width in patches: of a column one patch wide (`models.patches`)."""
        runtime = importlib.import_module("xfuser.core.distributed.runtime_state")
        runtime.get_runtime_state().pp_patches_height = [count]


_kept = SimpleNamespace(blocks=())


def enter(device: torch.device) -> None:
    """Imports what is needed of xfuser and changes what must be changed.

    Raises:
        XditError: `load_failed` for another version than this file was made for.
    """
    found = importlib.metadata.version("xfuser")
    if found != VERSION:
        raise XditError(
            Code.LOAD_FAILED,
            f"xfuser {found} is installed, but this xditd works with {VERSION}: pip install xfuser=={VERSION}.",
        )
    os.environ.setdefault("LOG_LEVEL", "ERROR")  # read when it is imported; below, it comments on every start
    _bare(BARE[0])
    envs = importlib.import_module("xfuser.envs")
    if device.type == "cpu":
        _pretend_no_gpu(envs)
    _bare(BARE[1])
    # In this order: xfuser's modules import each other in circles, which only some entrances survive.
    importlib.import_module("xfuser.core.distributed")
    importlib.import_module("xfuser.core.fast_attention")
    importlib.import_module("xfuser.model_executor.models")
    _bare(BARE[2])
    _patch_attention(importlib.import_module("xfuser.model_executor.layers.usp"), device)


def preload() -> None:
    """Imports all that ranks on a CPU will, ahead of them."""
    enter(torch.device("cpu"))
    importlib.import_module("xfuser.config.config")
    for module in (*WRAPPERS.values(), "register"):
        importlib.import_module(f"{BARE[2]}.{module}")


def keep_attention_out_of_compiling() -> None:
    """From now on torch.compile breaks off before xfuser's attention and goes on behind it."""
    for name, replaced in PATCHED.items():
        if "USP" in replaced:
            module: Any = importlib.import_module(name)
            module.USP = torch.compiler.disable(module.USP)


def join(
    *,
    device: torch.device,
    rank: int,
    world: int,
    store: str,
    ulysses: int,
    ring: int,
    attention: str,
    groups: int = 1,
) -> World:
    """Meets the other ranks; `enter` comes before. Blocks until all have come.

    Args:
        device: of this rank; bound already, as NCCL's communicators take the device that is current.
        rank: of this process.
        world: how many there are.
        store: "file:///…", the same for all and fresh.
        ulysses, ring: degrees of a group whose ranks split a sequence; they are neighbours.
        groups: how many of these there are; the product of the three is `world`.
        attention: xfuser's name of a kernel that returns its log-sum-exp.
    """
    state = importlib.import_module("xfuser.core.distributed.parallel_state")
    state.init_distributed_environment(
        world_size=world, rank=rank, distributed_init_method=store, local_rank=device.index or 0
    )
    # xfuser's own cfg degree is 1 or 2, and its tensor degree would take our layers apart again; to its groups data
    # parallelism is the same as either, of any degree.
    state.initialize_model_parallel(
        data_parallel_degree=groups,
        sequence_parallel_degree=ulysses * ring,
        ulysses_degree=ulysses,
        ring_degree=ring,
    )
    return World(ulysses, ring, attention, state.get_sp_group(), groups)


def _bare(name: str) -> None:
    """Makes a package importable without running its `__init__`."""
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise XditError(Code.LOAD_FAILED, f"{name} is not installed; pip install 'xditd[daemon]'.")
    package = importlib.util.module_from_spec(spec)
    sys.modules[name] = package
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, package)


def _pretend_no_gpu(envs: ModuleType) -> None:
    patched: Any = envs
    patched._is_cuda = patched._is_hip = lambda: False
    patched.get_device_version = lambda: None
    patched.get_torch_distributed_backend = lambda: "gloo"
    # yunchang, which makes the ulysses and ring groups, runs on gloo as well; the check wants a GPU.
    patched.PACKAGES_CHECKER.packages_info["has_long_ctx_attn"] = True


def _start_runtime(ulysses: int, ring: int, groups: int, heads: int, attention: str) -> None:
    """xfuser's runtime state. It asks a pipeline for a few numbers of its transformer; PipeFusion alone uses most."""
    config = importlib.import_module("xfuser.config.config")
    runtime = importlib.import_module("xfuser.core.distributed.runtime_state")
    world = ulysses * ring * groups
    engine = config.EngineConfig(
        model_config=config.ModelConfig(model=""),
        runtime_config=config.RuntimeConfig(attention_backend=attention),
        parallel_config=config.ParallelConfig(
            dp_config=config.DataParallelConfig(dp_degree=groups, dit_parallel_size=world),
            sp_config=config.SequenceParallelConfig(
                ulysses_degree=ulysses, ring_degree=ring, dit_parallel_size=world
            ),
            pp_config=config.PipeFusionParallelConfig(attn_layer_num_for_pp=None, dit_parallel_size=world),
            tp_config=config.TensorParallelConfig(dit_parallel_size=world),
            fs_config=config.FullyShardConfig(dit_parallel_size=world),
            vae_config=config.VaeParallelConfig(),
            world_size=world,
            dit_parallel_size=world,
            vae_parallel_size=0,
        ),
        fast_attn_config=config.FastAttnConfig(),
    )
    numbers = SimpleNamespace(num_attention_heads=heads, attention_head_dim=1, patch_size=1, in_channels=1)
    pipeline = SimpleNamespace(transformer=SimpleNamespace(config=numbers), vae_scale_factor=8)
    runtime.initialize_runtime_state(pipeline, engine)
    started = runtime.get_runtime_state()
    started.split_text_embed_in_sp = True  # every rank has its share of the text
    started.max_condition_sequence_length = 0  # read, and used by PipeFusion alone
    started.ready = True  # for the forwards that ask
    started.input_config.width = pipeline.vae_scale_factor  # of a patch, in pixels


def _patch_attention(usp: ModuleType, device: torch.device) -> None:
    patched: Any = usp
    if patched._get_attention_function.__module__ == __name__:
        return  # patched already
    groups = importlib.import_module("yunchang.globals")
    kernels = importlib.import_module("xfuser.core.distributed.attention_backend").AttentionBackendType
    stock: Callable[[Any], Attend] = patched._get_attention_function
    patched.PROCESS_GROUP = groups.PROCESS_GROUP
    patched._has_kv_cache = lambda layer: False
    patched._get_attention_function = lambda backend=None: _without_pads(stock(backend), patched)
    registry = patched.ATTENTION_FUNCTION_REGISTRY
    registry[kernels.SDPA_EFFICIENT] = _efficient
    if device.type == "cpu":
        registry[kernels.SDPA_FLASH] = _flash_cpu


def _without_pads(attend: Attend, usp: Any) -> Attend:
    """One call's attention function with the pads left out of K and V.

    USP asks for a function afresh in every call, and ring attention calls it once a step: at step i with the block
    of ring rank (own - i).
    """
    blocks = _kept.blocks
    if not blocks:
        return attend
    owner = torch.distributed.get_rank(usp.PROCESS_GROUP.RING_PG)

    def without_pads(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        nonlocal owner
        positions = blocks[owner % len(blocks)].get(key.shape[2])
        owner -= 1
        if positions is not None:
            key, value = key.index_select(2, positions), value.index_select(2, positions)
        return attend(query, key, value, **rest)

    return without_pads


def _patch_processors(processors: ModuleType) -> None:
    joint: Any = processors.xFuserJointAttnProcessor2_0
    stock = joint.__call__
    if stock.__module__ == __name__:
        return  # patched already

    def call(self: Any, attn: Any, hidden_states: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if rest or named.get("encoder_hidden_states") is not None:
            return stock(self, attn, hidden_states, *rest, **named)
        return _attend_to_self(attn, hidden_states, processors.USP)

    joint.__call__ = call


def _attend_to_self(attn: Any, hidden_states: torch.Tensor, usp: Callable[..., torch.Tensor]) -> torch.Tensor:
    """diffusers' joint attention without a text, over all ranks."""
    query, key, value = (
        linear(hidden_states).unflatten(-1, (attn.heads, -1)) for linear in (attn.to_q, attn.to_k, attn.to_v)
    )
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    seen = usp(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_layer=attn)
    output: torch.Tensor = attn.to_out[0](seen.transpose(1, 2).flatten(2).to(query.dtype))
    return output


def _flash_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float, is_causal: bool,
    attention_kwargs: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p=dropout_p, is_causal=is_causal
    )
    return out, lse


def _efficient(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout_p: float, is_causal: bool,
    attention_kwargs: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_bias=None, compute_log_sumexp=True, dropout_p=dropout_p, is_causal=is_causal
    )
    return out, lse[..., : query.shape[2]]  # the kernel pads it to a multiple of 32 queries
