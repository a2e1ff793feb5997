"""The transformer learns from the judge: of one caption's pictures, to draw rather those that fit than those that do not.

DiffusionNFT (arXiv:2509.16117): from pictures x0 that a policy v_old drew, each with an r that is above 1/2 where it is
better than its caption's others, the loss at a sigma between is

    r · |x0(v) - x0|² + (1 - r) · |x0(2 v_old - v) - x0|²,        x0(v) = x - sigma · v

each square over the mean of what it is the square of. So v moves away from v_old, towards what fitted. The captions are not
those of the exam.

What v is to move away from has no bound: at too high a rate a policy gets better for a while and then draws nothing at all.
So what is kept is the average as it was when the policy drew best, and it ends when that is over.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import sdpa_kernel

from tools.train_demo import dataset
from tools.train_demo.judge import judge
from tools.train_demo.networks import GUIDANCE, SCALE, SHIFT, SIGMA_SHIFT, Networks, shifted
from tools.train_demo.pace import Average, Piece, Snapshots, autocast, paced, rate
from tools.train_demo.scenes import Description, caption, described
from tools.train_demo.train_flux import ATTENTION, LONG, ids, told
from xditd.models.flux import inputs

ALIKE = 8  # pictures of one caption
STEPS = 8  # in which they are drawn
LESSONS = 4  # that are had of them, at other sigmas each
FOLLOWS = 0.5  # how much of what was learnt the policy has at the next pictures
JUDGED_AT_ONCE = 16
SCORED = 20  # steps over which a score is taken
FALLEN = 0.1  # below the best score: it is over


@dataclass(frozen=True, slots=True)
class Drawn:
    """Pictures of a policy.

    Attributes:
        x0: their latents [B, 256, 64], packed; text: what the transformer was told of each.
        verdicts: whether they fit, B values, once the judges are done.
    """

    x0: torch.Tensor
    text: dict[str, torch.Tensor]
    verdicts: list[Future[list[bool]]]

    def better(self) -> torch.Tensor:
        """How each compares with its caption's others: 1/2 where it is like them, up to 1, down to 0; [B]."""
        fit = torch.tensor(self._all(), device=self.x0.device).float().view(-1, ALIKE)
        apart = (fit - fit.mean(1, keepdim=True)) / (2 * fit.std().clamp_min(0.1))
        return apart.clamp(-0.5, 0.5).flatten() + 0.5

    def score(self) -> float:
        """The part of them that fit."""
        fit = self._all()
        return sum(fit) / len(fit)

    def _all(self) -> list[bool]:
        return [one for part in self.verdicts for one in part.result()]


def train_judged(piece: Piece, *, peak: float, seed: int) -> None:
    """A piece of it: `piece.batch` pictures are drawn at once, and learnt from while the next ones are judged."""
    net, device = piece.net, piece.device
    old = copy.deepcopy(net.flux).requires_grad_(False)
    if device.type == "cuda":
        net.flux.compile_repeated_blocks(fullgraph=True, dynamic=False)
        old.compile_repeated_blocks(fullgraph=True, dynamic=False)
    parameters = list(net.flux.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    average, snapshots = Average(net.flux), Snapshots(piece.write)
    easel = Easel(net, old, random.Random(seed))
    scores: list[float] = []
    best, best_score = average.kept, 0.0
    with ProcessPoolExecutor(initializer=_alone, mp_context=get_context("forkserver")) as judges:
        drawn = easel.draw(piece.batch, judges)
        for step, done in enumerate(paced(piece)):
            following = easel.draw(piece.batch, judges)
            better = drawn.better()
            scores.append(drawn.score())
            telling = torch.nonzero(better != 0.5).flatten()
            for group in optimiser.param_groups:
                group["lr"] = rate(step, done, peak, piece.hold)
            if len(telling):
                for chosen in _lessons(telling, piece.batch // 2):
                    text = {name: value[chosen] for name, value in drawn.text.items()}
                    loss = lost(net, old, drawn.x0[chosen], text, better[chosen])
                    loss.backward()
                    nn.utils.clip_grad_norm_(parameters, 1.0)
                    optimiser.step()
                    optimiser.zero_grad(set_to_none=True)
                    average.update()
            torch._foreach_lerp_(list(old.parameters()), [p.detach() for p in parameters], FOLLOWS)
            drawn = following
            if step % SCORED == 0:
                recent = sum(scores[-SCORED:]) / len(scores[-SCORED:])
                piece.log(step=step, fit=round(recent, 4), telling=len(telling))
                if recent >= best_score:
                    best, best_score = [kept.clone() for kept in average.kept], recent
                    snapshots.keep(average)
                elif recent < best_score - FALLEN:
                    break
    piece.log(best=round(best_score, 4))
    average.kept = best
    average.swap()


def lost(
    net: Networks, old: Any, x0: torch.Tensor, text: dict[str, torch.Tensor], better: torch.Tensor
) -> torch.Tensor:
    """The loss above, of pictures at one sigma each."""
    count, device = len(x0), x0.device
    sigma = shifted(torch.rand(count, device=device), SIGMA_SHIFT)
    x = torch.lerp(x0, torch.randn_like(x0), sigma[:, None, None])
    asked = asking(x, sigma, text)
    with autocast(device), sdpa_kernel(ATTENTION):
        v = net.flux(**asked)[0].float()
        with torch.no_grad():
            v_old = old(**asked)[0].float()

    def off(velocity: torch.Tensor) -> torch.Tensor:
        error = x - sigma[:, None, None] * velocity - x0
        return error.square().mean((1, 2)) / error.detach().abs().mean((1, 2)).clamp_min(1e-5)

    return (better * off(v) + (1 - better) * off(2 * v_old - v)).mean()


def asking(x: torch.Tensor, sigma: torch.Tensor, text: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the transformer is asked with, of packed latents."""
    text_ids, image_ids = ids(LONG, x.device)
    guidance = torch.full_like(sigma, GUIDANCE)
    return {
        "hidden_states": x,
        "timestep": sigma,
        "guidance": guidance,
        "txt_ids": text_ids,
        "img_ids": image_ids,
        "return_dict": False,
        **text,
    }


class Easel:
    """Where the policy draws captions that are not held out."""

    def __init__(self, net: Networks, policy: Any, chance: random.Random) -> None:
        self._net, self._policy, self._chance = net, policy, chance
        self._vae = copy.deepcopy(net.vae).to(torch.bfloat16)

    @torch.no_grad()
    def draw(self, count: int, judges: ProcessPoolExecutor) -> Drawn:
        """`count` pictures, ALIKE of each caption; and gives them to the judges."""
        device = next(self._policy.parameters()).device
        descriptions = [described(self._chance, held=False) for _ in range(count // ALIKE)]
        clip, t5 = dataset.tokens(caption(one, self._chance) for one in descriptions)
        t5 = nn.functional.pad(t5, (0, LONG - t5.shape[1]))
        text = told(self._net, clip.to(device).long(), t5.to(device).long())
        text = {name: value.repeat_interleave(ALIKE, 0) for name, value in text.items()}
        x = inputs.pack(torch.randn(len(descriptions) * ALIKE, 16, 32, 32, device=device))
        with autocast(device), sdpa_kernel(ATTENTION):
            for now, then in pairwise(shifted(torch.linspace(1, 0, STEPS + 1), SIGMA_SHIFT).tolist()):
                sigma = torch.full((len(x),), now, device=device)
                x = x + self._policy(**asking(x, sigma, text))[0].float() * (then - now)
        asked = [one for one in descriptions for _ in range(ALIKE)]
        verdicts = []
        for begin in range(0, len(x), JUDGED_AT_ONCE):
            part = slice(begin, begin + JUDGED_AT_ONCE)
            latents = inputs.unpack(x[part], 32, 32) / SCALE + SHIFT
            pictures = self._vae.decode(latents.to(torch.bfloat16)).sample.float() / 2 + 0.5
            pixels = (pictures.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            verdicts.append(judges.submit(_judged, pixels, asked[part]))
        return Drawn(x, text, verdicts)


def _lessons(telling: torch.Tensor, most: int) -> Iterator[torch.Tensor]:
    """Of pictures that tell something: LESSONS times all of them, by chance in parts of at most so many, all of one size.

    A compiled network is compiled for one size: where there are fewer, some come twice.
    """
    for _ in range(LESSONS):
        order = telling[torch.randperm(len(telling), device=telling.device)]
        for begin in range(0, len(order), most):
            part = order[begin : begin + most]
            if begin and len(part) < most // 2:
                continue
            yield part.repeat(-(-most // len(part)))[:most]


def _judged(pixels: np.ndarray, descriptions: list[Description]) -> list[bool]:
    pictures = pixels.astype(np.float32) / 255
    return [judge(picture, one).fits for picture, one in zip(pictures, descriptions, strict=True)]


def _alone() -> None:
    torch.set_num_threads(1)
