"""Weights between two models, of which the second was trained from the first (arXiv:2109.01903).

    python -m tools.train_demo.blend FROM TO --share 0.6 --out DIR

What `train judged` gave drew less and less after it had been best; on the way back to what it came from lies a model that
draws better than either.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch

from tools.train_demo import networks
from tools.train_demo.networks import FILES, Networks

FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


@click.command()
@click.argument("source", type=FOLDER)
@click.argument("target", type=FOLDER)
@click.option("--share", default=0.5, help="0 is the first model, 1 the second.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(source: Path, target: Path, share: float, out: Path) -> None:
    """Writes the transformer between SOURCE's and TARGET's, with the text encoders, which both must have alike."""
    first, second = (read(folder) for folder in (source, target))
    for one, other in zip(texts(first), texts(second), strict=True):
        if not torch.equal(one, other):
            raise click.ClickException(
                "The two have other text encoders: nothing between them would be read."
            )
    with torch.no_grad():
        for one, other in zip(first.flux.parameters(), second.flux.parameters(), strict=True):
            one.lerp_(other, share)
    networks.write(first, out, ("flux", "clip", "t5"))


def read(folder: Path) -> Networks:
    net = Networks()
    with torch.no_grad():
        networks.read(net, folder, tuple(name for name in FILES if name != "vae"))
    return net


def texts(net: Networks) -> list[torch.Tensor]:
    return [*net.clip.parameters(), *net.t5.parameters()]


if __name__ == "__main__":
    main()
