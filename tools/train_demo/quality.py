"""The judge's score of networks in this process, while they are trained; with a sheet of what they draw."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from tools.train_demo import dataset
from tools.train_demo.judge import judge
from tools.train_demo.networks import GUIDANCE, SCALE, SHIFT, SIGMA_SHIFT, Networks, shifted
from tools.train_demo.scenes import caption
from xditd.models.flux import inputs

TRIED = ((8, 1.0), (16, 1.0), (12, 2.0), (16, 3.5))
"""Steps and cfg."""

SHEET = 6  # pictures of a sheet, each way


@torch.compiler.set_stance("force_eager")  # other shapes than training's
@torch.no_grad()
def score(net: Networks, device: torch.device, count: int, log: Callable[..., None], out: Path) -> None:
    """Draws held-out descriptions, judges them, and writes `sheet.png` and what was wrong."""
    exam = dataset.exam(count)
    texts = [caption(description) for description in exam]
    for steps, cfg in TRIED:
        for filled in (256, 64) if (steps, cfg) == (16, 1.0) else (256,):
            pictures = draw(net, device, texts, steps, cfg, filled)
            verdicts = [judge(p, d) for p, d in zip(pictures, exam, strict=True)]
            right = sum(verdict.fits for verdict in verdicts)
            log(judged=count, steps=steps, cfg=cfg, text_tokens=filled, fit=right)
            if (steps, cfg, filled) == (16, 1.0, 256):
                for text, verdict in zip(texts, verdicts, strict=True):
                    if not verdict.fits and right > count // 2:
                        print(f"  {text}: {'; '.join(verdict.faults)}")
                sheet(torch.tensor(pictures[: SHEET**2])).save(out / "sheet.png")


def sheet(pictures: torch.Tensor) -> Image.Image:
    """Pictures [n, 256, 256, 3] in a square of rows, from the first; places without one are white."""
    side = pictures.shape[1]
    table = torch.ones(SHEET**2, side, side, 3)
    table[: len(pictures)] = pictures
    rows = table.view(SHEET, SHEET, side, side, 3).permute(0, 2, 1, 3, 4)
    whole = rows.reshape(SHEET * side, SHEET * side, 3)
    return Image.fromarray((whole * 255).round().byte().numpy()).resize((1152, 1152))


def draw(net: Networks, device: torch.device, texts: list[str], steps: int, cfg: float, filled: int):
    """Pictures [N, 256, 256, 3] as numpy, by Euler's method on the sigmas of a dev."""
    made = []
    for begin in range(0, len(texts), 50):
        part = texts[begin : begin + 50]
        generator = torch.Generator().manual_seed(begin)
        x = torch.randn(len(part), 16, 32, 32, generator=generator).to(device)
        both = dataset.tokens([*part, *[""] * len(part)])
        clip_ids, t5_ids = (ids.to(device).long() for ids in both)
        context, pooled = net.read_text(clip_ids, F.pad(t5_ids, (0, filled - t5_ids.shape[1])))
        if cfg == 1:
            context, pooled = context[: len(part)], pooled[: len(part)]
        for now, then in itertools.pairwise(shifted(torch.linspace(1, 0, steps + 1), SIGMA_SHIFT)):
            twice = len(context) // len(part)
            predicted = net.flux(
                hidden_states=inputs.pack(x).repeat(twice, 1, 1),
                encoder_hidden_states=context,
                pooled_projections=pooled,
                timestep=torch.full((len(context),), now.item(), device=device),
                guidance=torch.full((len(context),), GUIDANCE, device=device),
                txt_ids=inputs.text_ids(filled, device),
                img_ids=inputs.image_ids(32, 32, device),
                return_dict=False,
            )[0]
            parts = inputs.unpack(predicted, 32, 32).chunk(twice)
            velocity = parts[0] if twice == 1 else parts[1] + cfg * (parts[0] - parts[1])
            x = x + velocity * (then - now).item()
        picture = net.vae.decode(x / SCALE + SHIFT).sample
        made.append((picture / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu())
    return torch.cat(made).numpy()
