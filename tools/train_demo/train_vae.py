"""Trains the VAE."""

from __future__ import annotations

import math

import torch
from torch import nn

from tools.train_demo import dataset, render
from tools.train_demo.networks import SCALE
from tools.train_demo.pace import Average, Log, Piece, autocast, paced, rate

MEASURED = 512 if torch.cuda.is_available() else 8  # pictures by which the latents' variance is
MOST_SCENES = 20_000
PULL = 4e-4  # of the VAE's latents towards a normal distribution


def train_vae(piece: Piece) -> None:
    """Pictures to latents and back: absolute error, that of edges too, and a light pull towards a normal distribution."""
    vae, device, log = piece.net.vae, piece.device, piece.log
    known = dataset.make(min(piece.scenes, MOST_SCENES), seed=1).numbers.to(device)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=0, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    average = Average(vae)
    for step, done in enumerate(paced(piece)):
        for group in optimiser.param_groups:
            group["lr"] = rate(step, done, 1.5e-3, piece.hold)
        with torch.no_grad():
            whole = render.render(known[torch.randint(len(known), (piece.batch,), device=device)]) * 2 - 1
        # Mostly quarters: the networks are convolutions but for the attention in the middle.
        if step % 4 == 0:
            whole = whole[: piece.batch // 4]
        else:
            top, left = (8 * int(torch.randint(17, ())) for _ in range(2))
            whole = whole[:, :, top : top + 128, left : left + 128]
        whole = whole.contiguous(memory_format=torch.channels_last)
        with autocast(device):
            moments = vae.encode(whole).latent_dist
            mean, log_variance = moments.mean.float(), moments.logvar.float()
            latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
            again = vae.decode(latent).sample.float()
        error = again - whole
        across, down = error.diff(dim=-1), error.diff(dim=-2)
        drawn = error.abs().mean() + 2 * error.square().mean()
        edges = across.abs().mean() + down.abs().mean()
        normal = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = drawn + edges + PULL * normal
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        average.update()
        if step % 200 == 0:
            log(
                step=step,
                drawn=round(drawn.item(), 5),
                edges=round(edges.item(), 5),
                kl=round(normal.item(), 3),
            )
    average.swap()
    _unit_variance(vae, known, log)


@torch.no_grad()
def _unit_variance(vae: nn.Module, scenes: torch.Tensor, log: Log) -> None:
    """Multiplies latents, on their way out of the encoder and into the decoder, to have the variance of Flux's."""
    latent = torch.cat(
        [vae.encode(render.render(part) * 2 - 1).latent_dist.mean for part in scenes[:MEASURED].split(32)]
    )
    factor = 1 / (SCALE * latent.std())
    channels = latent.shape[1]
    vae.encoder.conv_out.weight[:channels] *= factor
    vae.encoder.conv_out.bias[:channels] *= factor
    vae.encoder.conv_out.bias[channels:] += 2 * factor.log()
    vae.decoder.conv_in.weight /= factor
    picture = render.render(scenes[:32]) * 2 - 1
    again = vae.decode(vae.encode(picture).latent_dist.mean).sample
    log(
        latent_factor=round(factor.item(), 3),
        mean_of_channels=[round(x, 2) for x in (latent.mean((0, 2, 3)) * factor).tolist()],
        std_of_channels=[round(x, 2) for x in (latent.std((0, 2, 3)) * factor).tolist()],
        psnr=round(10 * math.log10(4 / (again.clamp(-1, 1) - picture).square().mean().item()), 2),
    )
