"""Trains the transformer, and the text encoders with it."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tools.train_demo import dataset, render
from tools.train_demo.muon import Muon
from tools.train_demo.networks import SCALE, SHIFT, Networks
from tools.train_demo.pace import Average, Log, Piece, autocast, paced, rate
from xditd.models.flux import inputs

ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
EMPTY = 0.1  # of the captions are taken away, for cfg

TAUGHT_SHIFT = 5.0
"""As SIGMA_SHIFT, of the sigmas that are trained: four in ten lie between 0.8 and 0.97."""

LONG_TEXTS = (0.15, 1.0)
"""The part of the steps whose text is filled to 256 tokens, before the text encoders have their form and after."""

TAUGHT_GUIDANCE = (1.0, 6.0)


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
    piece: Piece, seed: int, data: Path | None, cache: Path | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, CLIP's and T5's tokens of scenes, on the device; kept in a file between pieces where one is named."""
    device, log = piece.device, piece.log
    if cache is not None and cache.exists():
        kept = load_file(cache)
    else:
        captioned = dataset.make(piece.scenes, seed) if data is None else dataset.read(data)
        log(scenes=len(captioned.numbers))
        made = latents(piece.net, captioned.numbers, device)
        kept = {"latents": made.cpu().contiguous(), "clip": captioned.clip, "t5": captioned.t5}
        if cache is not None:
            save_file(kept, cache)
    target = kept["latents"].to(device)
    log(
        latents=list(target.shape),
        mean=round(target.float().mean().item(), 3),
        std=round(target.float().std().item(), 3),
    )
    return target, kept["clip"].to(device).long(), kept["t5"].to(device).long()


def train_flux(
    piece: Piece,
    *,
    peak: float,
    seed: int,
    round_at: float,
    muon: bool,
    guided: bool,
    data: Path | None,
    cache: Path | None,
) -> None:
    """Flow matching (arXiv:2210.02747): the velocity noise - latent, at every sigma between.

    Sigmas are drawn mostly high (TAUGHT_SHIFT). Measured of a model that was trained on even ones: its error
    is 0.49 at 0.999, 0.22 at 0.9, 0.05 at 0.8 and 0.02 at 0.6, so that what and where things are is decided above 0.8.

    ComfyUI fills a text to 256 tokens, programs need not, and nothing masks what is filled: both must be learnt. The
    long ones cost half as much again, so they come as seldom as will do, and alone at the end.

    Where it is `guided`, guidance becomes part of the model, as in FLUX.1-dev: the velocity is then

        noise - latent + (guidance - 1) · (teacher(x, caption) - teacher(x, ""))

    whose teacher is the network that it began with (arXiv:2502.12154 with a teacher that stands still), so that one pass
    draws what took two with cfg.

    For the last part the text encoders are rounded to what their files hold, and the transformer learns to read those.
    """
    net, device, batch, log = piece.net, piece.device, piece.batch, piece.log
    target, clip_ids, t5_ids = cached(piece, seed, data, cache)
    no_clip, no_t5 = (ids.to(device).long() for ids in dataset.tokens([""]))
    trained = nn.ModuleList([net.flux, net.clip, net.t5])
    parameters = list(trained.parameters())
    optimisers = optimisers_of(net, parameters, muon)
    average = Average(trained)
    teacher = copy.deepcopy(net.flux).requires_grad_(False) if guided else None
    if device.type == "cuda":
        for network in (net.flux, teacher):
            if network is not None:
                network.compile_repeated_blocks(fullgraph=True, dynamic=False)
    ids = {}
    remedies = Remedies()
    heard = torch.zeros((), device=device)
    rounded = False
    chance = random.Random(seed)
    if piece.state is not None and piece.state.exists():
        resume(piece.state, trained, optimisers, average)
        log(resumed=str(piece.state))
    for step, done in enumerate(paced(piece)):
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate(step, done, peak, piece.hold)
        if done >= round_at and not rounded:
            average.settle(net.clip, net.t5)
            rounded = True
        chosen = torch.randint(len(target), (batch,), device=device)
        x0 = target[chosen].float()
        silent = torch.rand(batch, 1, device=device) < EMPTY
        clip_now = torch.where(silent, no_clip, clip_ids[chosen])
        t5_now = torch.where(silent, no_t5, t5_ids[chosen])
        filled = remedies.lengths[-1 if chance.random() < LONG_TEXTS[rounded] or step < 2 else 0]
        t5_now = F.pad(t5_now, (0, filled - t5_now.shape[1]))
        even = torch.rand(batch, device=device)
        sigma = TAUGHT_SHIFT * even / (1 + (TAUGHT_SHIFT - 1) * even)
        noise = torch.randn_like(x0)
        along = sigma[:, None, None, None]
        x = torch.lerp(x0, noise, along)
        if filled not in ids:
            ids[filled] = (inputs.text_ids(filled, device), inputs.image_ids(32, 32, device))
        guidance = torch.empty(batch, device=device).uniform_(*TAUGHT_GUIDANCE)
        asked = {
            "hidden_states": inputs.pack(x),
            "timestep": sigma,
            "guidance": guidance,
            "txt_ids": ids[filled][0],
            "img_ids": ids[filled][1],
            "return_dict": False,
        }
        velocity = inputs.pack(noise - x0)
        with autocast(device), sdpa_kernel(ATTENTION):
            with torch.set_grad_enabled(not rounded):
                text = told(net, clip_now, t5_now)
            predicted = net.flux(**asked, **text)[0].float()
            if teacher is not None:
                with torch.no_grad():
                    nothing = told(net, no_clip, F.pad(no_t5, (0, filled - no_t5.shape[1])))
                    nothing = {name: value.expand(batch, *value.shape[1:]) for name, value in nothing.items()}
                    heard_it, heard_nothing = (teacher(**asked, **one)[0].float() for one in (text, nothing))
                velocity += (guidance - 1)[:, None, None] * (heard_it - heard_nothing)
        loss = F.mse_loss(predicted, velocity)
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
    if piece.state is not None:
        keep(piece.state, trained, optimisers, average)
    average.swap()


def told(net: Networks, clip_ids: torch.Tensor, t5_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the transformer is told of a text."""
    context, pooled = net.read_text(clip_ids, t5_ids)
    return {"encoder_hidden_states": context.float(), "pooled_projections": pooled.float()}


def keep(path: Path, trained: nn.Module, optimisers: list[torch.optim.Optimizer], average: Average) -> None:
    torch.save(
        {
            "networks": trained.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in optimisers],
            "average": average.state(),
        },
        path,
    )


def resume(path: Path, trained: nn.Module, optimisers: list[torch.optim.Optimizer], average: Average) -> None:
    """Goes on where `keep` stopped."""
    kept = torch.load(path, map_location=next(trained.parameters()).device, weights_only=True)
    trained.load_state_dict(kept["networks"])
    for optimiser, state in zip(optimisers, kept["optimisers"], strict=True):
        optimiser.load_state_dict(state)
    average.resume(kept["average"])


def optimisers_of(net: Networks, parameters: list[nn.Parameter], muon: bool) -> list[torch.optim.Optimizer]:
    """AdamW for all; or Muon for the matrices of the blocks, AdamW for the rest."""
    blocks = [*net.flux.transformer_blocks.parameters(), *net.flux.single_transformer_blocks.parameters()]
    matrices = [parameter for parameter in blocks if parameter.ndim == 2] if muon else []
    theirs = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in parameters if id(parameter) not in theirs]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=0.0, betas=(0.9, 0.95), weight_decay=0.02, fused=True)
    ]
    if matrices:
        made.append(Muon(matrices, weight_decay=0.02))
    return made


class Remedies:
    """What is tried, one after the other, where a gradient is no number: seen with compiled blocks on a length of text
    that is no multiple of 64.

    Attributes:
        lengths: of texts, to which they are filled.
    """

    def __init__(self) -> None:
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
