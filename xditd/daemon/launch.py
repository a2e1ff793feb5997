"""How a rank is told what it is: the spec and the environment of each rank of a group. Pure."""

from __future__ import annotations

import os
from pathlib import Path

from xditd.daemon.config import Config
from xditd.daemon.groups import Group
from xditd.protocol.orders import RankSpec


def rank_specs(group: Group, config: Config, runtime: Path) -> list[RankSpec]:
    """The spec of every rank.

    Args:
        runtime: the daemon's own folder; the ranks' socket is `ranks.sock` in it.
    """
    info = group.found.info
    on_cpu = group.devices[0].startswith("cpu")
    return [
        RankSpec(
            group=group.name,
            generation=group.generation,
            rank=rank.rank,
            world=len(group.ranks),
            device=rank.device,
            plan=group.key.plan,
            endpoint=f"ipc://{runtime}/ranks.sock",
            store=f"file://{store(group, runtime)}",
            parent=os.getpid(),
            path=group.found.path,
            part=group.key.part,
            family=info.family,
            variant=info.variant,
            dtype=group.key.dtype,
            threads=config.devices.threads_per_rank(os.cpu_count() or 1) if on_cpu else 0,
            compile=config.compute.compile,
            attention=config.compute.attention,
            options=config.debug.rank_options,
        )
        for rank in group.ranks
    ]


def store(group: Group, runtime: Path) -> Path:
    """The file by which the group's ranks find each other. They leave it where they are killed."""
    return runtime / f"{group.name}.{group.generation}.store"


def environment(spec: RankSpec) -> dict[str, str]:
    """Variables of a rank process, beyond the daemon's own."""
    variables = {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # "cuda:1" is the card that nvidia-smi calls 1
        "HF_HUB_OFFLINE": "1",  # nothing is ever fetched
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    if spec.device.startswith("cpu"):
        variables["GLOO_SOCKET_IFNAME"] = "lo"
        variables["OMP_NUM_THREADS"] = str(max(1, spec.threads))
    return variables
