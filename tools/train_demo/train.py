"""Trains the demo's model, in pieces of a few minutes, each resumed from the last one's files.

    python -m tools.train_demo.train vae  --minutes 3 --out DIR
    python -m tools.train_demo.train flux --minutes 8 --out DIR --from DIR
    python -m tools.train_demo.train judged --minutes 5 --out DIR --from DIR

The log says how many steps its minutes had; `--steps` repeats them. A piece's result is what `networks.write` writes: a model that draws.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import click
import torch

from tools.train_demo import dataset, lessons, networks
from tools.train_demo.networks import Networks
from tools.train_demo.pace import Log, Piece
from tools.train_demo.quality import score
from tools.train_demo.train_flux import train_flux
from tools.train_demo.train_judged import train_judged
from tools.train_demo.train_vae import train_vae

BATCH = {"vae": 64, "flux": 256, "judged": 512}
"""The stages that train, and how many pictures a step of each has."""


@click.command()
@click.argument("stage", type=click.Choice(["data", *BATCH]))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option(
    "--from", "source", type=click.Path(path_type=Path, exists=True), help="An earlier piece's folder."
)
@click.option("--minutes", default=5.0)
@click.option(
    "--until", default=math.inf, help="Seconds since 1970 at which training ends, whatever the minutes."
)
@click.option("--steps", type=int, default=None, help="Instead of minutes.")
@click.option("--batch", type=int, default=None)
@click.option("--scenes", default=100_000)
@click.option("--peak", default=1e-3, help="The highest learning rate of the transformer.")
@click.option(
    "--round-at", default=0.65, help="Part of the piece after which the text encoders have their final form."
)
@click.option("--muon", is_flag=True, help="Muon for the matrices of the blocks.")
@click.option("--guided", is_flag=True, help="Makes guidance part of the model that it begins from.")
@click.option(
    "--hold", default=0.5, help="Part of the piece at the full learning rate; 1 where another follows."
)
@click.option(
    "--state", type=click.Path(path_type=Path), help="File by which the next piece goes on just so."
)
@click.option(
    "--unrecorded", is_flag=True, help="Starts every kernel by itself, not a step as one CUDA graph."
)
@click.option("--data", type=click.Path(path_type=Path), help="Scenes that `data` made.")
@click.option("--cache", type=click.Path(path_type=Path), help="File for scenes' latents, made once.")
@click.option("--seed", default=0)
@click.option("--exam", default=200, help="Held-out captions of the judge; 0 leaves it out.")
def main(
    stage,
    out,
    source,
    minutes,
    until,
    steps,
    batch,
    scenes,
    peak,
    seed,
    round_at,
    muon,
    guided,
    hold,
    state,
    unrecorded,
    data,
    cache,
    exam,
) -> None:
    """Trains one piece."""
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    log = Log(out / "log.jsonl")
    net = Networks().to(device).eval()  # no dropout
    if source is not None:
        with torch.no_grad():
            networks.read(
                net, source, tuple(n for n in networks.FILES if (source / networks.FILES[n][0]).exists())
            )
            log(resumed=str(source))
    if stage == "data":
        dataset.write(dataset.make(scenes, seed), out / "data.safetensors")
        return
    net.vae.to(memory_format=torch.channels_last)
    names = ("vae",) if stage == "vae" else ("flux", "clip", "t5")
    write = partial(networks.write, net, out, names)
    batch = batch or BATCH[stage]
    record = device.type == "cuda" and not unrecorded
    piece = Piece(net, device, batch, scenes, steps, minutes, until, hold, state, record, log, write)
    if stage == "vae":
        train_vae(piece)
    elif stage == "judged":
        train_judged(piece, peak=peak, seed=seed)
    else:
        learnt = lessons.read(piece, seed, data, cache)
        train_flux(piece, learnt, peak=peak, seed=seed, round_at=round_at, muon=muon, guided=guided)
    write()
    if exam and stage != "vae":
        networks.read(net, out, names)  # as it is shipped, rounded
        score(net, device, exam, log, out)


if __name__ == "__main__":
    main()
