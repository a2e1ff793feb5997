"""Answers of a daemon as they look in life, for commands that are tested without one."""

from __future__ import annotations

from xditd.protocol.figures import ArenaStatus, DeviceStatus, GroupStatus, Nvlink, RankStatus, RunStatus
from xditd.protocol.messages import ModelInfo, ModelList, ModelRef, Plan, SkippedFile, StatusReport

GIB = 1 << 30
FLUX = ModelRef(kind="diffusion_models", name="flux/flux1-dev.safetensors")
VAE = ModelRef(kind="vae", name="ae.safetensors")
PLAN = Plan(devices=("cuda:0", "cuda:1"), ulysses=2, reason="24 heads divide by 2, and both GPUs are free.")


def report(**changes) -> StatusReport:
    """Two GPUs, a Flux on both, a VAE that failed, a run under way and one that waits."""
    facts = {
        "re": 1,
        "state": "serving",
        "version": "0.1.0",
        "epoch": "5e1f9c0d7b2a",
        "pid": 4242,
        "uptime": 11103.4,
        "devices": (
            DeviceStatus(
                name="cuda:0",
                model="NVIDIA H200",
                uuid="GPU-1b",
                memory_total=140 * GIB,
                memory_used=41 * GIB,
                temperature=54,
                power=612.4,
                utilization=97,
                busy=True,
                power_limit=700.0,
                throttled=("idle", "power_cap"),
                nvlink=Nvlink(links=18, up=17, generation=4, speed=26.562e9, peers={"switch": 17}),
                age=0.4,
            ),
            DeviceStatus(name="cuda:1", model="NVIDIA H200", memory_total=140 * GIB, memory_used=130 * GIB),
        ),
        "groups": (
            GroupStatus(
                group="g3",
                generation=2,
                state="ready",
                model=FLUX,
                family="flux",
                variant="dev",
                dtype="bfloat16",
                plan=PLAN,
                ranks=tuple(
                    RankStatus(
                        rank=rank,
                        pid=5000 + rank,
                        device=f"cuda:{rank}",
                        phase="ready",
                        rss=2 * GIB,
                        device_memory=24 * GIB,
                        attention="flash",
                    )
                    for rank in (0, 1)
                ),
                runs=1,
                turns=284,
                seconds=4.2,
            ),
            GroupStatus(
                group="g4",
                generation=1,
                state="failed",
                model=VAE,
                family="autoencoder_kl",
                variant="flux",
                dtype="float32",
                plan=Plan(devices=("cuda:1",)),
                ranks=(RankStatus(rank=0, pid=5007, device="cuda:1", phase="gone"),),
                problem="Rank 0 ran out of memory on cuda:1; free some, or use a smaller dtype.",
            ),
        ),
        "runs": (
            RunStatus(
                run=17,
                state="working",
                model=FLUX,
                group="g3",
                label="a [red] fox",
                client="ComfyUI 0.3.64",
                step=12,
                total=28,
                age=8.31,
                rebinds=1,
            ),
            RunStatus(run=18, state="queued", model=FLUX, client="script", position=1, age=0.4),
        ),
        "arenas": (ArenaStatus(client="ComfyUI 0.3.64", pid=777, uid=1000, segments=2, bytes=128 << 20),),
        "arena_bytes": 128 << 20,
        "arena_limit": 16 * GIB,
    }
    return StatusReport(**(facts | changes))


def empty_report(**changes) -> StatusReport:
    """A daemon that has just begun."""
    nothing = {"groups": (), "runs": (), "arenas": (), "arena_bytes": 0, "uptime": 0.8}
    return report(**(nothing | changes))


def models() -> ModelList:
    """A Flux, its VAE, and a file that cannot be loaded."""
    return ModelList(
        re=1,
        models=(
            ModelInfo(
                kind="diffusion_models",
                name="flux/flux1-dev.safetensors",
                part="transformer",
                family="flux",
                variant="dev",
                dtype="bfloat16",
                bytes=23_802_932_552,
                parameters=11_901_408_320,
            ),
            ModelInfo(
                kind="vae",
                name="ae.safetensors",
                part="vae",
                family="autoencoder_kl",
                variant="flux",
                dtype="float32",
                bytes=335_304_388,
                parameters=83_819_683,
            ),
        ),
        skipped=(
            SkippedFile(
                kind="checkpoints",
                name="old.ckpt",
                code="file_refused",
                message="old.ckpt is a pickle, which can run code; use its .safetensors.",
            ),
        ),
        roots=("/data/ComfyUI/models/diffusion_models", "/data/ComfyUI/models/vae"),
    )
