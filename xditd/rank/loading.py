"""From a RankSpec to the worker that does its orders: imports, the world, the model. The slow part of a rank's life."""

from __future__ import annotations

import math
import os
import sys
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from xditd.catalog.detection import role
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import Plan
from xditd.protocol.orders import RankSpec
from xditd.protocol.plans import degrees_of, spell_degrees
from xditd.rank.answers import Worker
from xditd.rank.faults import Faults
from xditd.rank.places import Places

if TYPE_CHECKING:
    from xditd.models.reading import Keeper
    from xditd.models.splits import Divide
    from xditd.rank.device import Device

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
}
"""Variables that libraries read as they are imported, where nobody else has set them."""


class Tell(Protocol):
    """Reports a phase: "importing", "joining", "loading"; of the last one how many bytes are in place, and of how many."""

    def __call__(self, phase: str, loaded: int = 0, total: int = 0) -> None: ...


LEFT_OUT = ("peft", "transformers")
"""Packages that a transformer or a VAE never calls, but diffusers and xfuser import where they are installed: two of
the six seconds that a rank starts in. None in sys.modules makes them look not installed. (A text encoder calls
transformers.)"""


def load(spec: RankSpec, places: Places, faults: Faults, tell: Tell) -> Worker:
    """The worker of a spec, ready.

    Raises:
        XditError: for a plan, file or family that cannot be served.
        Exception: whatever else a library finds wrong.
    """
    if spec.family == "echo":
        from xditd.rank.echo import Echo

        faults.at_load()
        return Echo(places, spec.rank)
    _check(spec)
    tell("importing")
    _prepare(spec)
    from xditd.rank.transfer import DTYPES

    if spec.dtype not in DTYPES:
        raise XditError(
            Code.BAD_VALUE, f"No model computes in {spec.dtype!r}; float32 and bfloat16 would work."
        )
    if role(spec.part) == "transformer":
        return _load_transformer(spec, places, faults, tell)
    return _load_whole(spec, places, faults, tell)


def _load_transformer(spec: RankSpec, places: Places, faults: Faults, tell: Tell) -> Worker:
    from xditd.rank import attention
    from xditd.rank.cfg import CfgParallel
    from xditd.rank.denoiser import Denoiser
    from xditd.rank.device import Device
    from xditd.rank.transfer import DTYPES, Transfer

    device, plan = Device(spec.device), spec.plan
    sequence = plan.ulysses * plan.ring
    kernel = attention.choose(device.torch, DTYPES[spec.dtype], spec.attention, in_world=sequence > 1)
    backend = spec.options.get("compiler", "inductor" if device.is_cuda else "")
    compiling = bool(spec.compile and backend)
    if compiling and (plan.pipefusion > 1 or plan.shard or plan.offload or plan.weight_dtype):
        print("Compiling is for ranks whose weights stay as they are; these run eagerly.", file=sys.stderr)
        compiling = False
    if plan.pipefusion > 1:
        return _load_stage(spec, places, faults, tell)
    world: Any = None
    tensor: Any = None
    sharding: Any = None
    if sequence > 1:
        from xditd.rank import xfuser_seam
        from xditd.rank.parallel import SequenceParallel

        xfuser_seam.enter(device.torch)
        tell("joining")
        world = xfuser_seam.join(
            device=device.torch,
            rank=spec.rank,
            world=spec.world,
            store=spec.store,
            ulysses=plan.ulysses,
            ring=plan.ring,
            groups=plan.cfg * plan.tensor,
            attention=kernel.xfuser,
        )
    elif spec.world > 1:
        _meet(spec, device.is_cuda, tell)
    if plan.tensor > 1:
        from xditd.rank.tensor import TensorParallel

        tensor = TensorParallel.join(plan.tensor, sequence, spec.rank, spec.world)
    if plan.shard:
        from xditd.rank.sharding import WeightSharding

        sharding = WeightSharding.join(sequence, spec.rank, spec.world, device.torch)
    dividing = tensor or sharding
    network = _read(spec, device, faults, tell, None if dividing is None else dividing.divide, sharding)
    faults.at_output(network.backbone)
    name = kernel.name
    if world is not None:
        if compiling:
            xfuser_seam.keep_attention_out_of_compiling()
        run = partial(network.run, world.wrap(network.backbone, network.heads // plan.tensor))
        network.call = SequenceParallel(run, network.tokens, world, device.torch)
        if sharding is not None:
            network.predict = sharding.around(network.predict)
    else:
        network.backbone.set_attention_backend(kernel.diffusers)
        name = attention.heeded(kernel, network.backbone, spec.attention)
    if compiling:
        from xditd.models.families import FAMILIES
        from xditd.models.splits import in_layers
        from xditd.rank.compiling import compile_layers

        print("Layers are compiled at the first step, which takes up to a minute.", file=sys.stderr)
        layers = in_layers(network.backbone, FAMILIES[spec.family].layers)
        compile_layers(network, layers, alone=sequence * plan.tensor == 1, backend=backend)
    cfg = CfgParallel(plan.cfg, spec.rank, spec.world, device.torch)
    transfer = Transfer(device.torch, spec.rank, spec.world, places)
    return Denoiser(network, transfer, device, name, cfg)


def _load_stage(spec: RankSpec, places: Places, faults: Faults, tell: Tell) -> Worker:
    from xditd.models.families import in_stages
    from xditd.rank import attention
    from xditd.rank.device import Device
    from xditd.rank.links import Links
    from xditd.rank.pipefusion import PipeFusion
    from xditd.rank.stage import Stage
    from xditd.rank.transfer import DTYPES, Transfer

    device = Device(spec.device)
    kernel = attention.choose(device.torch, DTYPES[spec.dtype], spec.attention)
    _meet(spec, device.is_cuda, tell)
    links = Links(spec.plan.pipefusion, spec.rank, spec.world, device.torch)
    network = _read(spec, device, faults, tell, Stage(links.stage, links.stages).divide)
    stages = in_stages(spec.family, network)
    network.backbone.set_attention_backend(kernel.diffusers)
    name = attention.heeded(kernel, network.backbone, spec.attention)
    transfer = Transfer(device.torch, spec.rank, spec.world, places)
    return PipeFusion(network, stages, links, transfer, device, name)


def _load_whole(spec: RankSpec, places: Places, faults: Faults, tell: Tell) -> Worker:
    """A VAE or a text encoder: every rank of a world has all of its weights."""
    from xditd.rank.device import Device
    from xditd.rank.text import Text
    from xditd.rank.transfer import Transfer

    device = Device(spec.device)
    if spec.world > 1:
        _meet(spec, device.is_cuda, tell)
    network = _read(spec, device, faults, tell)
    transfer = Transfer(device.torch, spec.rank, spec.world, places)
    if role(spec.part) == "text_encoder":
        return Text(network, transfer, device, "native")
    from xditd.rank.vae import Vae  # diffusers, which a text encoder has no need of

    if spec.world > 1:
        from xditd.rank.spatial import SpatialParallel

        network = SpatialParallel(network, spec.rank, spec.world)
    return Vae(network, transfer, device, "native", faults)


def _meet(spec: RankSpec, is_cuda: bool, tell: Tell) -> None:
    """Meets the other ranks without xfuser, where no sequence is split."""
    import torch.distributed

    tell("joining")
    torch.distributed.init_process_group(
        "nccl" if is_cuda else "gloo", init_method=spec.store, world_size=spec.world, rank=spec.rank
    )


def _read(
    spec: RankSpec,
    device: Device,
    faults: Faults,
    tell: Tell,
    divide: Divide | None = None,
    keeper: Keeper | None = None,
) -> Any:
    """The network of a spec from its file, after the ranks of a world have met; `divide` and `keeper` as `models.families.load` says."""
    from xditd.models.families import load as load_network
    from xditd.rank.transfer import DTYPES

    tell("loading")
    faults.at_load()
    return load_network(
        spec.family,
        spec.path,
        spec.part,
        device.torch,
        DTYPES[spec.dtype],
        divide,
        partial(tell, "loading"),
        spec.plan.offload,
        keeper,
        spec.plan.weight_dtype,
    )


def _check(spec: RankSpec) -> None:
    """Refuses what this version does not do. The daemon's planner does so first; this is the last line."""
    plan: Plan = spec.plan
    degrees = degrees_of(plan)
    spelt = spell_degrees(degrees) or "one rank"
    if role(spec.part) != "text_encoder" and math.prod(degrees.values()) != spec.world:
        raise XditError(Code.BAD_PLAN, f"{spelt} is not the world of {spec.world} ranks.")
    if plan.pipefusion > 1 and plan.tensor * plan.ulysses * plan.ring > 1:
        raise XditError(Code.NOT_BUILT, f"{spelt} is not built in this version; pipefusion with cfg is.")
    if plan.shard and (plan.offload or plan.tensor * plan.pipefusion > 1):
        raise XditError(
            Code.BAD_PLAN, f"{spelt} with shard has its weights in two ways; leave one of them out."
        )
    if plan.shard and plan.weight_dtype:
        raise XditError(
            Code.NOT_BUILT, f"{spelt} with shard and weights in {plan.weight_dtype} is not built; either is."
        )


def _prepare(spec: RankSpec) -> None:
    """What libraries read when they are imported, or at their first use."""
    if spec.device.startswith("cpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if spec.store.startswith("file:"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are here: listen to nobody else
    if spec.threads:
        os.environ["OMP_NUM_THREADS"] = str(spec.threads)
    for name in LEFT_OUT:
        if name != "transformers" or role(spec.part) != "text_encoder":
            sys.modules[name] = None  # type: ignore[assignment]
    silence()
    import torch

    if spec.threads:
        torch.set_num_threads(spec.threads)
    torch.set_grad_enabled(False)


def silence() -> None:
    """Before libraries are imported: they neither look at a hub nor comment on each other."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    # Of torch about xfuser, of diffusers about torch.
    warnings.filterwarnings("ignore", category=FutureWarning)
