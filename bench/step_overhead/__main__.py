"""`python -m bench.step_overhead`: prints what the daemon adds to a step, and writes it as JSON."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import Progress

from bench import machine
from bench.daemon import serving
from bench.step_overhead import report, weights
from bench.step_overhead.alternate import alternate, difference
from bench.step_overhead.contenders import Bare, BareWithCopies, Daemon
from bench.step_overhead.size import FLUX_DEV, SMALL
from xditd.client import Client
from xditd.protocol.messages import ModelRef, PlanRequest

AGREE = {torch.bfloat16: 0.05, torch.float32: 1e-4}
"""How far the two predictions may be apart, in standard deviations: else they did not compute the same."""

WARM_UPS = 3


@click.command()
@click.option("--small", is_flag=True, help="A tiny model on the CPU: to try this script, not to quote.")
@click.option("--rounds", default=30, show_default=True)
@click.option("--steps", default=3, show_default=True, help="Timed steps of a turn.")
@click.option("--compile/--eager", "compiled", default=True, help="Regional compile, on both sides alike.")
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where the model file goes (24 GB); it stays there."
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Every single time, for programs.")
@click.option("--markdown", "markdown_file", type=click.Path(path_type=Path), help="The table, for the docs.")
def main(
    small: bool,
    rounds: int,
    steps: int,
    compiled: bool,
    folder: Path | None,
    json_file: Path | None,
    markdown_file: Path | None,
) -> None:
    """Compares a step through client and daemon with the bare forward pass on one device."""
    console = Console()
    if not small and not torch.cuda.is_available():
        raise click.ClickException("There is no CUDA device; --small tries the script on the CPU.")
    size = SMALL if small else FLUX_DEV
    device = torch.device("cpu" if small else "cuda:0")
    compiled = compiled and not small
    facts = machine.describe("torch", "diffusers", "xfuser") | {
        "device": "CPU, one thread" if small else torch.cuda.get_device_name(device),
        "model": size.says,
        "compute": "regional compile, dynamic" if compiled else "eager",
    }
    if small:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="xditd-bench-") as temporary:
        models = (folder or Path(temporary)).absolute()
        path = models / "flux-random.safetensors"
        if not path.exists():
            begin = time.perf_counter()
            weights.write(path, size, device)
            console.print(f"Wrote {path.stat().st_size / 1e9:.1f} GB in {time.perf_counter() - begin:.0f} s.")
        daemon = serving(
            devices__kind=device.type,
            devices__cpu_ranks=1,
            devices__threads=1,
            models__folders__diffusion_models=[str(models)],
            compute__compile=compiled,
        )
        with daemon as endpoint, Client(endpoint, name="bench", timeout=60) as client:
            begin = time.perf_counter()
            reference = ModelRef(kind="diffusion_models", name=path.name)
            with client.open_run(
                reference, PlanRequest(devices=(str(device) if not small else "cpu:0",))
            ) as run:
                console.print(f"The daemon had the model ready after {time.perf_counter() - begin:.0f} s.")
                inputs = size.inputs(seed=0)
                bare = Bare(path, size.dtype, device, inputs, compiled)
                facts["attention"] = bare.kernel.name
                _same_kernel(client, bare)
                through = Daemon(run, inputs)
                contenders = (bare, BareWithCopies(bare), through)
                bare.settle(inputs["x"])
                for contender in contenders:
                    begin = time.perf_counter()
                    for _ in range(WARM_UPS):
                        contender.step(inputs["x"])
                    console.print(f"Warmed up {contender.name}: {time.perf_counter() - begin:.0f} s.")
                apart = difference(through.step(inputs["x"]), bare.step(inputs["x"]))
                facts["agreement"] = f"predictions at most {apart:.2g} standard deviations apart"
                if not apart <= AGREE[size.dtype]:
                    raise click.ClickException(f"The predictions are {apart:.2g} standard deviations apart.")
                generator = torch.Generator().manual_seed(1)

                def fresh() -> torch.Tensor:
                    return torch.randn(size.latent, generator=generator).to(size.dtype)

                with Progress(console=console, transient=True) as progress:
                    task = progress.add_task("steps", total=rounds * len(contenders))
                    times = alternate(
                        contenders, bare, fresh, rounds, steps, on_turn=lambda: progress.advance(task)
                    )
    report.show(console, times, facts)
    if markdown_file:
        markdown_file.write_text(report.markdown(times, facts), encoding="utf-8")
    if json_file:
        json_file.write_text(json.dumps({"machine": facts, "seconds": times}, indent=1), encoding="utf-8")


def _same_kernel(client: Client, bare: Bare) -> None:
    """Like is compared with like only."""
    kernels = {rank.attention for group in client.status().groups for rank in group.ranks}
    if kernels != {bare.kernel.name}:
        raise click.ClickException(
            f"The rank attends with {kernels}, the bare module with {bare.kernel.name}."
        )


if __name__ == "__main__":
    main()
