"""Trains the demo's model, in pieces of a few minutes, each resumed from the last one's files.

    python -m tools.train_demo.train vae  --minutes 3 --out DIR
    python -m tools.train_demo.train flux --minutes 8 --out DIR --from DIR

A piece times its first steps and sets the number of the others by them; the log says the number, and `--steps` repeats
it exactly. A piece's result is what `networks.write` writes: a model that draws.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tools.train_demo import dataset, networks, render
from tools.train_demo.networks import SCALE, SHIFT, SIGMA_SHIFT, TEXT_DTYPE, Networks
from tools.train_demo.quality import score
from xditd.models.flux import inputs

WARM = 200  # steps in which the learning rate rises
TIMED = 30  # steps by which the others are counted
MEASURED = 512 if torch.cuda.is_available() else 8  # pictures by which the latents' variance is
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
PULL = 4e-4  # of the VAE's latents towards a normal distribution
EMPTY = 0.1  # of the captions are taken away, for cfg
EMA = 0.9995


class Log:
    """Lines for a person and for the card: printed, and kept as JSON."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a")
        self._began = time.monotonic()

    def __call__(self, **fields: object) -> None:
        fields = {"seconds": round(time.monotonic() - self._began, 1), **fields}
        print(" ".join(f"{name}={value}" for name, value in fields.items()), flush=True)
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()


class Average:
    """An exponential moving average of parameters: what is shipped."""

    def __init__(self, network: nn.Module) -> None:
        self.names = [name for name, _ in network.named_parameters()]
        self.live = [parameter for _, parameter in network.named_parameters()]
        self.kept = [parameter.detach().clone() for parameter in self.live]
        self._steps = 0

    def update(self) -> None:
        self._steps += 1
        decay = min(EMA, self._steps / (self._steps + 10))
        torch._foreach_lerp_(self.kept, [p.detach() for p in self.live], 1 - decay)

    @torch.no_grad()
    def settle(self, *networks: nn.Module) -> None:
        """Rounds the averages of networks to what their files hold; they are theirs from then on, and stay."""
        theirs = {id(parameter) for network in networks for parameter in network.parameters()}
        for kept, live in zip(self.kept, self.live, strict=True):
            if id(live) in theirs:
                kept.copy_(kept.to(TEXT_DTYPE))
                live.copy_(kept)
                live.requires_grad_(False)

    def swap(self) -> None:
        """Exchanges the average and what is trained."""
        for kept, live in zip(self.kept, self.live, strict=True):
            trained = live.detach().clone()
            live.data.copy_(kept)
            kept.copy_(trained)


def rate(step: int, done: float, peak: float) -> float:
    """The learning rate: up in a line for the first steps, down along a cosine with the part that is done."""
    return peak * min(1.0, (step + 1) / WARM) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def paced(steps: int | None, minutes: float, until: float, log: Log) -> Iterator[float]:
    """Counts steps: gives which part of them is done, 0 to 1."""
    began, step = time.monotonic(), 0
    total = steps
    while total is None or step < total:
        if total is None and step == TIMED:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            began = time.monotonic()
        if total is None and step == 3 * TIMED:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            took = (time.monotonic() - began) / (2 * TIMED)
            left = min(minutes * 60, until - time.time())
            total = step + max(1, int(left / took))
            log(steps=total, milliseconds_a_step=round(took * 1e3, 2))
        yield 0.0 if total is None else step / total
        step += 1


def autocast(device: torch.device):
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


# ------------------------------------------------------------------------------------------------------- the VAE


def train_vae(
    net: Networks,
    device: torch.device,
    batch: int,
    scenes: int,
    steps: int | None,
    minutes: float,
    until: float,
    log: Log,
):
    """Pictures to latents and back: absolute error, that of edges too, and a light pull towards a normal distribution."""
    vae = net.vae
    known = dataset.make(scenes, seed=1).numbers.to(device)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=0, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    average = Average(vae)
    for step, done in enumerate(paced(steps, minutes, until, log)):
        for group in optimiser.param_groups:
            group["lr"] = rate(step, done, 1.5e-3)
        with torch.no_grad():
            whole = render.render(known[torch.randint(len(known), (batch,), device=device)]) * 2 - 1
        # Mostly quarters: the networks are convolutions but for the attention in the middle.
        if step % 4 == 0:
            whole = whole[: batch // 4]
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


# --------------------------------------------------------------------------------------------------- transformer


@torch.no_grad()
def latents(net: Networks, numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What the transformer learns to draw: [N, 16, 32, 32], scaled, bfloat16, on the device."""
    vae = copy.deepcopy(net.vae).to(torch.bfloat16)
    made = []
    for part in numbers.split(64):
        picture = (render.render(part.to(device)) * 2 - 1).to(torch.bfloat16)
        mean = vae.encode(picture.contiguous(memory_format=torch.channels_last)).latent_dist.mean.float()
        made.append(((mean - SHIFT) * SCALE).to(torch.bfloat16))
    return torch.cat(made)


def cached(
    net: Networks,
    device: torch.device,
    scenes: int,
    seed: int,
    data: Path | None,
    cache: Path | None,
    log: Log,
):
    """Latents, CLIP's and T5's tokens of scenes, on the device; kept in a file between pieces where one is named."""
    if cache is not None and cache.exists():
        target, clip_ids, t5_ids = torch.load(cache, map_location=device)
    else:
        captioned = dataset.make(scenes, seed) if data is None else dataset.Captioned(**torch.load(data))
        log(scenes=len(captioned.numbers))
        target, clip_ids, t5_ids = latents(net, captioned.numbers, device), captioned.clip, captioned.t5
        if cache is not None:
            torch.save((target.cpu(), clip_ids, t5_ids), cache)
    log(
        latents=list(target.shape),
        mean=round(target.float().mean().item(), 3),
        std=round(target.float().std().item(), 3),
    )
    return target, clip_ids.to(device).long(), t5_ids.to(device).long()


def train_flux(
    net: Networks,
    device: torch.device,
    batch: int,
    scenes: int,
    steps: int | None,
    minutes: float,
    until: float,
    log: Log,
    *,
    peak: float,
    seed: int,
    round_at: float,
    muon: bool,
    data: Path | None,
    cache: Path | None,
):
    """Flow matching (arXiv:2210.02747): the velocity noise - latent, at every sigma between.

    Sigmas are drawn as they are sampled, most of them high. Measured of a model that was trained on even ones: its error
    is 0.49 at 0.999, 0.22 at 0.9, 0.05 at 0.8 and 0.02 at 0.6, so that what and where things are is decided above 0.8.

    For the last part the text encoders are rounded to what their files hold, and the transformer learns to read those.
    """
    target, clip_ids, t5_ids = cached(net, device, scenes, seed, data, cache, log)
    no_clip, no_t5 = (ids.to(device).long() for ids in dataset.tokens([""]))
    trained = nn.ModuleList([net.flux, net.clip, net.t5])
    parameters = list(trained.parameters())
    optimisers = optimisers_of(net, parameters, muon)
    average = Average(trained)
    if device.type == "cuda":
        net.flux.compile_repeated_blocks(fullgraph=True, dynamic=False)
    ids = {}
    remedies = Remedies()
    heard = torch.zeros((), device=device)
    rounded = False
    for step, done in enumerate(paced(steps, minutes, until, log)):
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate(step, done, peak)
        if done >= round_at and not rounded:
            average.settle(net.clip, net.t5)
            rounded = True
        chosen = torch.randint(len(target), (batch,), device=device)
        x0 = target[chosen].float()
        silent = torch.rand(batch, 1, device=device) < EMPTY
        clip_now = torch.where(silent, no_clip, clip_ids[chosen])
        t5_now = torch.where(silent, no_t5, t5_ids[chosen])
        filled = remedies.lengths[-1 if step % 5 < 2 else 0]
        t5_now = F.pad(t5_now, (0, filled - t5_now.shape[1]))
        even = torch.rand(batch, device=device)
        sigma = SIGMA_SHIFT * even / (1 + (SIGMA_SHIFT - 1) * even)
        noise = torch.randn_like(x0)
        along = sigma[:, None, None, None]
        x = torch.lerp(x0, noise, along)
        if filled not in ids:
            ids[filled] = (inputs.text_ids(filled, device), inputs.image_ids(32, 32, device))
        with autocast(device), sdpa_kernel(ATTENTION):
            with torch.set_grad_enabled(not rounded):
                context, pooled = net.read_text(clip_now, t5_now)
            predicted = net.flux(
                hidden_states=inputs.pack(x),
                encoder_hidden_states=context.float(),
                pooled_projections=pooled.float(),
                timestep=sigma,
                guidance=torch.empty(batch, device=device).uniform_(1, 6),
                txt_ids=ids[filled][0],
                img_ids=ids[filled][1],
                return_dict=False,
            )[0].float()
        loss = F.mse_loss(predicted, inputs.pack(noise - x0))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        if (step < 150 or step % 100 == 0) and not norm.isfinite():
            remedies(trained, loss, step, log)
            trained.zero_grad(set_to_none=True)
            continue
        for optimiser in optimisers:
            optimiser.step()
        trained.zero_grad(set_to_none=True)
        average.update()
        heard += (loss.detach() - heard) * 0.02
        if step % 250 == 0:
            log(step=step, loss=round(heard.item(), 5))
    average.swap()


def optimisers_of(net: Networks, parameters: list[nn.Parameter], muon: bool) -> list[torch.optim.Optimizer]:
    """AdamW for all; or Muon (kellerjordan.github.io/posts/muon) for the matrices of the blocks, AdamW for the rest."""
    blocks = [*net.flux.transformer_blocks.parameters(), *net.flux.single_transformer_blocks.parameters()]
    matrices = [parameter for parameter in blocks if parameter.ndim == 2] if muon else []
    theirs = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in parameters if id(parameter) not in theirs]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.95), weight_decay=0.02, fused=True)
    ]
    if matrices:
        made.append(torch.optim.Muon(matrices, lr=0.0, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"))
    return made


class Remedies:
    """What is tried, one after the other, where a gradient is no number: seen with compiled blocks on a length of text
    that is no multiple of 64.

    Attributes:
        lengths: of texts, to which they are filled.
    """

    def __init__(self) -> None:
        # ComfyUI fills a text to 256 tokens; programs need not. Nothing masks them, so both must be learnt.
        self.lengths = (64, 256)
        self._left = [self._one_length, self._eager]

    def _one_length(self) -> str:
        self.lengths = (256,)
        return "every text is filled to 256 tokens"

    def _eager(self) -> str:
        torch.compiler.set_stance("force_eager")
        return "nothing is compiled"

    def __call__(self, trained: nn.Module, loss: torch.Tensor, step: int, log: Log) -> None:
        """Takes the next one.

        Raises:
            SystemExit: none is left, or a weight is no number.
        """
        bad = [n for n, p in trained.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        lost = [n for n, p in trained.named_parameters() if not p.isfinite().all()]
        if lost or not self._left:
            raise SystemExit(f"Step {step}: no numbers: gradients {bad[:9]}, weights {lost[:9]}")
        remedy = self._left.pop(0)()
        log(step=step, loss=loss.item(), gradients=len(bad), last=bad[-1:], remedy=remedy)


# -------------------------------------------------------------------------------------------------------- pieces


@click.command()
@click.argument("stage", type=click.Choice(["data", "vae", "flux"]))
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
@click.option("--data", type=click.Path(path_type=Path), help="Scenes that `data` made.")
@click.option("--cache", type=click.Path(path_type=Path), help="File for scenes' latents, made once.")
@click.option("--seed", default=0)
@click.option("--exam", default=200, help="Held-out captions of the judge; 0 leaves it out.")
def main(
    stage, out, source, minutes, until, steps, batch, scenes, peak, seed, round_at, muon, data, cache, exam
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
        made = dataset.make(scenes, seed)
        torch.save({"numbers": made.numbers, "clip": made.clip, "t5": made.t5}, out / "data.pt")
        return
    if stage == "vae":
        net.vae.to(memory_format=torch.channels_last)
        train_vae(net, device, batch or 64, min(scenes, 20_000), steps, minutes, until, log)
        names: tuple[str, ...] = ("vae",)
    else:
        net.vae.to(memory_format=torch.channels_last)
        train_flux(
            net,
            device,
            batch or 256,
            scenes,
            steps,
            minutes,
            until,
            log,
            peak=peak,
            seed=seed,
            round_at=round_at,
            muon=muon,
            data=data,
            cache=cache,
        )
        names = ("flux", "clip", "t5")
    networks.write(net, out, names)
    if exam and stage == "flux":
        networks.read(net, out, names)  # as it is shipped, rounded
        score(net, device, exam, log, out)


if __name__ == "__main__":
    main()
