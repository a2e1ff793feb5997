"""Trains the transformer, and the text encoders with it."""

from __future__ import annotations

import copy
import random
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tools.train_demo import checkpoint
from tools.train_demo.lessons import Lessons
from tools.train_demo.muon import Muon
from tools.train_demo.networks import Networks
from tools.train_demo.pace import Average, Piece, Snapshots, autocast, paced, rate
from tools.train_demo.recorded import Recorded
from xditd.models.flux import inputs

ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

SHORT, LONG = 64, 256
"""Tokens to which T5's are filled: ComfyUI fills to the latter, programs need not, and nothing masks what is filled. A
compiled block on lengths that are no multiple of 64 gave gradients that are no numbers."""

LONG_TEXTS = (0.15, 0.5)
"""The part of the steps whose text is long, before the text encoders have their form and after: a long one costs half as
much again."""

TAUGHT_GUIDANCE = (1.0, 6.0)


def train_flux(
    piece: Piece, lessons: Lessons, *, peak: float, seed: int, round_at: float, muon: bool, guided: bool
) -> None:
    """Flow matching (arXiv:2210.02747): the velocity noise - latent, at every sigma between.

    Where it is `guided`, guidance becomes part of the model, as in FLUX.1-dev: the velocity is then

        noise - latent + (guidance - 1) · (teacher(x, caption) - teacher(x, ""))

    whose teacher is the network that it began with (arXiv:2502.12154 with a teacher that stands still), so that one pass
    draws what took two with cfg.

    For the last part the text encoders are rounded to what their files hold, and the transformer learns to read those.
    """
    net, device, log = piece.net, piece.device, piece.log
    trained = nn.ModuleList([net.flux, net.clip, net.t5])
    parameters = list(trained.parameters())
    optimisers = optimisers_of(net, parameters, muon)
    average, snapshots = Average(trained), Snapshots(piece.write)
    teacher = copy.deepcopy(net.flux).requires_grad_(False) if guided else None
    if device.type == "cuda":
        for network in (net.flux, teacher):
            if network is not None:
                network.compile_repeated_blocks(fullgraph=True, dynamic=False)
    if piece.state is not None and piece.state.exists():
        checkpoint.resume(piece.state, trained, optimisers, average)
        log(resumed=str(piece.state))
    heard, norm = torch.zeros((), device=device), torch.zeros((), device=device)
    rounded = False

    def step_of(filled: int, texts_too: bool) -> Recorded:
        def learn() -> None:
            loss = lost(net, teacher, lessons, piece.batch, filled, texts_too=texts_too)
            loss.backward()
            norm.copy_(nn.utils.clip_grad_norm_(parameters, 1.0))
            for optimiser in optimisers:
                optimiser.step()
            heard.lerp_(loss.detach(), 0.02)

        return Recorded(learn, parameters, piece.record)

    steps: dict[tuple[int, bool], Recorded] = {}
    chance = random.Random(seed)
    for step, done in enumerate(paced(piece)):
        set_rate(optimisers, rate(step, done, peak, piece.hold))
        if done >= round_at and not rounded:
            average.settle(net.clip, net.t5)
            rounded = True
            steps.clear()
        # The first are long: both lengths are to be compiled before time counts.
        kind = LONG if chance.random() < LONG_TEXTS[rounded] or step < 10 else SHORT, not rounded
        if kind not in steps:
            steps[kind] = step_of(*kind)
        steps[kind]()
        average.update()
        if step % 100 == 0 and not norm.isfinite():
            raise SystemExit(f"Step {step}: a gradient is no number.")
        if step % 500 == 0:
            log(step=step, loss=round(heard.item(), 5))
            snapshots.keep(average)
    if piece.state is not None:
        checkpoint.keep(piece.state, trained, optimisers, average)
    average.swap()


def lost(
    net: Networks, teacher: Any, lessons: Lessons, batch: int, filled: int, *, texts_too: bool
) -> torch.Tensor:
    """The mean square error of one lesson's velocities.

    Args:
        teacher: whose guidance is learnt; None learns none.
        texts_too: the text encoders learn as well.
    """
    lesson = lessons.draw(batch, filled)
    device = lesson.x.device
    guidance = torch.empty(batch, device=device).uniform_(*TAUGHT_GUIDANCE)
    text_ids, image_ids = ids(filled, device)
    asked = {
        "hidden_states": lesson.x,
        "timestep": lesson.sigma,
        "guidance": guidance,
        "txt_ids": text_ids,
        "img_ids": image_ids,
        "return_dict": False,
    }
    velocity = lesson.velocity
    with autocast(device), sdpa_kernel(ATTENTION):
        with torch.set_grad_enabled(texts_too):
            text = told(net, lesson.clip, lesson.t5)
        predicted = net.flux(**asked, **text)[0].float()
        if teacher is not None:
            with torch.no_grad():
                nothing = {
                    name: value.expand(batch, *value.shape[1:])
                    for name, value in told(net, *lessons.nothing(filled)).items()
                }
                of_text, of_nothing = (teacher(**asked, **one)[0].float() for one in (text, nothing))
            velocity = velocity + (guidance - 1)[:, None, None] * (of_text - of_nothing)
    return F.mse_loss(predicted, velocity)


def told(net: Networks, clip_ids: torch.Tensor, t5_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the transformer is told of a text."""
    context, pooled = net.read_text(clip_ids, t5_ids)
    return {"encoder_hidden_states": context.float(), "pooled_projections": pooled.float()}


@lru_cache(maxsize=2)
def ids(filled: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the tokens of text and of picture."""
    return inputs.text_ids(filled, device), inputs.image_ids(32, 32, device)


def optimisers_of(net: Networks, parameters: list[nn.Parameter], muon: bool) -> list[torch.optim.Optimizer]:
    """AdamW for all; or Muon for the matrices of the blocks, AdamW for the rest."""
    blocks = [*net.flux.transformer_blocks.parameters(), *net.flux.single_transformer_blocks.parameters()]
    matrices = [parameter for parameter in blocks if parameter.ndim == 2] if muon else []
    theirs = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in parameters if id(parameter) not in theirs]
    device = rest[0].device
    on_gpu = device.type == "cuda"
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            rest,
            lr=torch.zeros((), device=device),
            betas=(0.9, 0.95),
            weight_decay=0.02,
            fused=on_gpu,
            capturable=on_gpu,
        )
    ]
    if matrices:
        made.append(Muon(matrices, torch.zeros((), device=device), weight_decay=0.02))
    return made


def set_rate(optimisers: list[torch.optim.Optimizer], rate: float) -> None:
    """Gives every optimiser the learning rate, in the tensor in which a recorded step reads it."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"].fill_(rate)
