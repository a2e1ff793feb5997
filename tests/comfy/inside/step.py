"""What a step in the daemon costs ComfyUI's process, beside what a bare client pays. No rank does any work.

    COMFYUI_PATH=CHECKOUT PYTHONPATH=REPOSITORY PYTHON-OF-COMFYUI -m tests.comfy.inside.step [ROUNDS]

In every round, in turn: a step of ComfyUI's (`sampling_function`, a 1024² latent, cfg 1) on a model whose leaf does
nothing; the same on one whose leaf asks the daemon; and the same latent by the client alone. The remote step's cost is
the second less the first.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.comfy.inside import own

own.enter()

import comfy.samplers  # noqa: E402
import torch  # noqa: E402

from comfy_nodes import daemon  # noqa: E402
from comfy_nodes.dispatcher import Dispatcher  # noqa: E402
from comfy_nodes.patcher import make_model, remote  # noqa: E402
from tests.live.service import Service  # noqa: E402
from xditd.models.making import flux_facts  # noqa: E402
from xditd.protocol.messages import Loaded, ModelInfo, ModelRef, Plan, PlanRequest  # noqa: E402

ECHO = ModelRef(kind="echo", name="echo")
SHAPE = (1, 16, 128, 128)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"debug.echo": True, "devices.kind": "cpu", "devices.cpu_ranks": 1, "devices.threads": 1}
        service = Service(Path(folder), settings)
        try:
            with torch.inference_mode():
                print(json.dumps(measure(service, rounds), indent=1))
        finally:
            service.stop()


def measure(service: Service, rounds: int) -> dict[str, Any]:
    spec = Dispatcher(service.endpoint, ECHO, PlanRequest())
    info = ModelInfo(
        kind="echo", name="echo", part="", family="flux", variant="dev", dtype="float32", bytes=0, parameters=0,
        facts=flux_facts(),
    )  # fmt: skip
    loaded = Loaded(
        re=0, group="", plan=Plan(devices=()), model=info, dtype="float32", seconds=0.0, warm=True
    )
    model = make_model(spec, loaded)
    base, leaf = model.model, remote(model)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.7])
    context, pooled = torch.randn(1, 256, 4096), torch.randn(1, 768)
    positive = comfy.sampler_helpers.convert_cond([[context, {"pooled_output": pooled}]])
    conds = comfy.samplers.process_conds(base, x, {"positive": positive}, torch.device("cpu"))["positive"]
    model.pre_run()
    options = {"transformer_options": {"wrappers": model.wrappers}}
    local = own.model("", Nothing(leaf))
    local.pre_run()
    with leaf.sampling(), daemon.client(service.endpoint).open_run(ECHO) as run:
        run.put_conditioning("c", {"context": context, "pooled": pooled})
        turns: dict[str, Callable[[], Any]] = {
            "nothing": lambda: comfy.samplers.sampling_function(local.model, x, sigma, None, conds, 1.0),
            "remote": lambda: comfy.samplers.sampling_function(base, x, sigma, None, conds, 1.0, options),
            "client": lambda: run.denoise([(x, 0.7, "c")]),
        }
        wall: dict[str, list[float]] = {name: [] for name in turns}
        used: dict[str, list[float]] = {name: [] for name in turns}
        for number in range(rounds + 20):
            for name, turn in turns.items():
                began, cpu = time.perf_counter(), time.process_time()
                turn()
                if number >= 20:
                    wall[name].append(time.perf_counter() - began)
                    used[name].append(time.process_time() - cpu)
    return {"wall": report(wall), "cpu": report(used), "rounds": rounds}


def report(times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians in milliseconds, and the ratio of a round's remote cost to its bare client's."""
    ratios = [
        (remote - nothing) / client
        for nothing, remote, client in zip(times["nothing"], times["remote"], times["client"], strict=True)
    ]
    medians = {name: round(1000 * statistics.median(values), 3) for name, values in times.items()}
    quarters = statistics.quantiles(ratios, n=4)
    return {
        **medians,
        "ratio": round(quarters[1], 3),
        "quartiles": [round(quarters[0], 3), round(quarters[2], 3)],
    }


class Nothing(torch.nn.Module):
    """A leaf that does nothing, and gives what the daemon's echo gives."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.dtype, self.patch_size = like.dtype, like.patch_size
        self.in_channels = self.out_channels = 16
        self.params = type("Params", (), {"guidance_embed": True})

    def forward(self, x: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        return x.clone()


if __name__ == "__main__":
    main()
