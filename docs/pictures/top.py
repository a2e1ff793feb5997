"""Makes top.svg: `xditctl top` of a real daemon with two CPU ranks under load.

    .venv/bin/python docs/pictures/top.py

Small models are made, a daemon of its own is started, three clients sample on a Flux that is split over two ranks and a
fourth waits for a VAE; when all are under way, two frames are taken a second apart, and the second one is written.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from rich.console import Console

from xditd.cli.own_daemon import OwnDaemon
from xditd.cli.top_view import top_view
from xditd.client import Client
from xditd.protocol.messages import PlanRequest

FLUX = "diffusion_models/flux-small.safetensors"
USERS = (
    ("ComfyUI 0.3.64", "a red fox", 40),
    ("ComfyUI 0.3.64", "harbour at dusk", 30),
    ("batch.py", "thumbnails", 60),
)


def sample(endpoint: str, flux: str, name: str, label: str, steps: int, over: threading.Event) -> None:
    """One user, who samples until it is over."""
    sigmas = [1 - i / steps for i in range(steps)] + [0.0]

    def stop() -> None:
        if over.is_set():
            raise InterruptedError

    with Client(endpoint, name=name) as client:
        while not over.is_set():
            with client.open_run(flux, PlanRequest(ulysses=2), label=label, interrupt=stop) as run:
                info = run.model.facts
                facts = {
                    "context": torch.randn(1, 64, info["context_width"]),
                    "pooled": torch.randn(1, info["pooled_width"]),
                }
                run.put_conditioning("c", facts)
                noise = torch.randn(1, info["latent_channels"], 32, 32)
                try:
                    run.sample(noise, sigmas, "c", interrupt=stop)
                except InterruptedError:
                    return


def main() -> None:
    os.environ.pop("XDITD_ENDPOINT", None)
    with tempfile.TemporaryDirectory() as folder, OwnDaemon(2, Path(folder) / "models") as daemon:
        subprocess.run([sys.executable, "-m", "xditd.models.making", f"{folder}/models"], check=True)
        daemon.start()
        with daemon.connect() as client:
            listed = client.models().models
            flux = next(
                f"{i.kind}/{i.name}" for i in listed if i.family == "flux" and i.kind != "checkpoints"
            )
            vae = next(f"{i.kind}/{i.name}" for i in listed if i.kind == "vae")
            client.load(flux, PlanRequest(ulysses=2))
            over = threading.Event()
            users = [
                threading.Thread(target=sample, args=(daemon.endpoint, flux, *user, over)) for user in USERS
            ]
            for user in users:
                user.start()
            while sum(run.step > 4 for run in client.status().runs) < len(USERS):
                time.sleep(0.05)
            waits = threading.Thread(target=decode, args=(daemon.endpoint, vae))
            waits.start()
            while not any(run.state == "queued" for run in client.status().runs):
                time.sleep(0.01)
            before = client.status()
            time.sleep(1)
            report = client.status()
            over.set()
            for thread in (*users, waits):
                thread.join()
    console = Console(record=True, width=118, file=open(os.devnull, "w"), force_terminal=True, emoji=False)  # noqa: SIM115
    console.print(top_view(report, before))
    path = Path(__file__).with_name("top.svg")
    path.write_text(console.export_svg(title="xditctl top", unique_id="xditd-top"))
    print(path)


def decode(endpoint: str, vae: str) -> None:
    """Somebody whose model is not loaded yet."""
    with Client(endpoint, name="ComfyUI 0.3.64") as client:
        client.decode(vae, torch.randn(1, 16, 8, 8), PlanRequest(devices=("1",)))


if __name__ == "__main__":
    main()
