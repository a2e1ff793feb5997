"""Families beside Flux, small: their files, and what plain diffusers makes of them in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from xditd.models.filling import fill
from xditd.models.making_transformers import (
    hunyuandit_facts,
    make_hunyuandit,
    make_pixart,
    make_sd3,
    make_sdxl,
    pixart_facts,
    sd3_facts,
    sdxl_facts,
)
from xditd.models.reading import WeightFile

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]
Predict = Callable[[torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]
"""x, t and a conditioning to the network's output."""


@dataclass(frozen=True)
class Case:
    """One kind of model.

    Attributes:
        family: its name.
        make: writes its file.
        conditioning: of a text of so many tokens.
        reference: plain diffusers with the weights of a file, in float32 or another dtype.
        t: a timestep.
        sizes: of latents.
        predicts: "flow", "eps" or "v".
    """

    family: str
    make: Callable[[Path], Path]
    conditioning: Callable[..., Tensors]
    reference: Callable[..., Predict]
    t: float
    predicts: str = "eps"
    channels: int = 16
    parallel: bool = True
    sizes: tuple[tuple[int, int], ...] = ((32, 32), (33, 47), (18, 22))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def even(x: torch.Tensor) -> torch.Tensor:
    """A latent whose odd sides were padded from the opposite side, as ComfyUI pads."""
    return F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2), mode="circular")


def module_of(
    kind: type[torch.nn.Module], config: Mapping[str, Any], pieces: Any, path: Path, dtype: torch.dtype
) -> Any:
    with torch.device("meta"):
        module = kind(**config)
    fill(module, pieces, WeightFile(path), CPU, dtype)
    return module


def computing(dtype: torch.dtype, predict: Predict) -> Predict:
    """A prediction of what is rounded to a dtype first; the time is not."""

    def rounded(x: torch.Tensor, t: torch.Tensor, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        cast = {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()
        }
        return predict(x.to(dtype), t, cast).float()

    return rounded


# ----------------------------------------------------------------------------------------------------------- SD3


def _sd3(**kind: Any) -> Case:
    facts = sd3_facts(context_width=64, pooled_width=32, positions=28, **kind)

    def make(path: Path) -> Path:
        return make_sd3(path, facts, dtype=torch.float32)

    def reference(path: Path, dtype: torch.dtype = torch.float32) -> Predict:
        from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

        from xditd.catalog.layouts.sd3 import pieces
        from xditd.models.sd3.config import config

        module = module_of(SD3Transformer2DModel, config(facts), pieces(facts), path, dtype)

        @torch.no_grad()
        def predict(x: torch.Tensor, t: torch.Tensor, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
            batch, _, height, width = x.shape
            out = module(
                hidden_states=even(x),
                encoder_hidden_states=given["context"].expand(batch, -1, -1),
                pooled_projections=given["pooled"].expand(batch, -1),
                timestep=t,
                return_dict=False,
            )[0]
            return out[:, :, :height, :width]

        return computing(dtype, predict)

    def conditioning(text: int, batch: int = 1) -> Tensors:
        return {"context": normal(batch, text, 64, seed=text), "pooled": normal(batch, 32, seed=text + 1)}

    return Case("sd3", make, conditioning, reference, t=700.0, predicts="flow")


# -------------------------------------------------------------------------------------------------------- PixArt


def _pixart(**kind: Any) -> Case:
    facts = pixart_facts(context_width=64, text_tokens=20, **kind)

    def make(path: Path) -> Path:
        return make_pixart(path, facts, dtype=torch.float32)

    def reference(path: Path, dtype: torch.dtype = torch.float32) -> Predict:
        from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

        from xditd.catalog.layouts.pixart import pieces
        from xditd.models.pixart.config import config

        module = module_of(PixArtTransformer2DModel, config(facts), pieces(facts), path, dtype)

        @torch.no_grad()
        def predict(x: torch.Tensor, t: torch.Tensor, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
            batch, _, height, width = x.shape
            pictures = round((height + width) // 2 / 64)
            module.pos_embed.base_size = pictures * 32
            module.pos_embed.interpolation_scale = facts["positions"] // 32 or pictures
            sizes = {"resolution": None, "aspect_ratio": None}
            if facts["sizes"]:
                sizes = {
                    "resolution": torch.tensor([[height * 8.0, width * 8.0]] * batch),
                    "aspect_ratio": torch.tensor([[height / width]] * batch),
                }
            context = given["context"].expand(batch, -1, -1)
            out = module(x, context, timestep=t, added_cond_kwargs=sizes, return_dict=False)[0]
            return out[:, :4]

        return computing(dtype, predict)

    def conditioning(text: int, batch: int = 1) -> Tensors:
        return {"context": normal(batch, text, 64, seed=text)}

    sizes = ((34, 34), (40, 36), (36, 42))
    return Case("pixart", make, conditioning, reference, t=700.0, channels=4, sizes=sizes)


# ---------------------------------------------------------------------------------------------------- HunyuanDiT

FEW = (12, 14)
"""Tokens of the two texts that the padding of the small ones covers."""


def _hunyuandit(**kind: Any) -> Case:
    facts = hunyuandit_facts(
        head_dim=16, heads=4, ff=256, context_width=64, t5_width=64, pooled_width=48, text_tokens=FEW[0], t5_tokens=FEW[1],
        **kind,
    )  # fmt: skip

    def make(path: Path) -> Path:
        return make_hunyuandit(path, facts, dtype=torch.float32)

    def reference(path: Path, dtype: torch.dtype = torch.float32) -> Predict:
        from diffusers.models.embeddings import get_2d_rotary_pos_embed_from_grid
        from diffusers.models.transformers.hunyuan_transformer_2d import HunyuanDiT2DModel

        from xditd.catalog.layouts.hunyuandit import pieces
        from xditd.models.hunyuandit.config import config

        module = module_of(HunyuanDiT2DModel, config(facts), pieces(facts), path, dtype)

        @torch.no_grad()
        def predict(x: torch.Tensor, t: torch.Tensor, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
            batch, _, height, width = x.shape
            rows, columns = -(-height // 2), -(-width // 2)
            # Places as its makers have them, for one shape of picture at a time: in a square of 32, the longer side
            # fills it, the shorter one is in the middle.
            short = round(32 / max(rows, columns) * min(rows, columns))
            middle = round((32 - short) / 2)
            line = {True: np.linspace(0, 32, max(rows, columns), endpoint=False, dtype=np.float32)}
            line[False] = np.linspace(
                middle, middle + short, min(rows, columns), endpoint=False, dtype=np.float32
            )
            grid = np.stack(np.meshgrid(line[columns >= rows], line[rows >= columns]))
            turns = get_2d_rotary_pos_embed_from_grid(16, torch.from_numpy(grid)[:, None], use_real=True)
            sizes = torch.tensor([[height * 8.0, width * 8.0] * 2 + [0.0, 0.0]] * batch)
            # Its own forward takes the padding's number of tokens: more of them are a longer padding, where it is not.
            clip, t5 = (given[name].expand(batch, -1, -1).contiguous() for name in ("context", "context_t5"))
            kept = torch.cat([given[name].expand(batch, -1) for name in ("mask", "mask_t5")], dim=1)
            padding = module.text_embedding_padding.split(FEW)
            longer = [
                F.pad(part, (0, 0, text.shape[1] - len(part), 0))
                for part, text in zip(padding, (clip, t5), strict=True)
            ]
            module.text_embedding_padding = torch.nn.Parameter(torch.cat(longer), requires_grad=False)
            pooler = module.time_extra_emb.pooler
            stock, pooler.forward = (
                pooler.forward,
                lambda text: type(pooler).forward(pooler, text[:, : FEW[1]]),
            )
            out = module(
                hidden_states=even(x),
                timestep=t.to(dtype),  # of which it takes the dtype of its arithmetic
                encoder_hidden_states=clip,
                text_embedding_mask=kept[:, : clip.shape[1]],
                encoder_hidden_states_t5=t5,
                text_embedding_mask_t5=kept[:, clip.shape[1] :],
                image_meta_size=sizes,
                style=torch.zeros(batch, dtype=torch.long),
                image_rotary_emb=turns,
                return_dict=False,
            )[0]
            module.text_embedding_padding = torch.nn.Parameter(torch.cat(padding), requires_grad=False)
            pooler.forward = stock
            return out[:, :4, :height, :width]

        return computing(dtype, predict)

    def conditioning(text: int, batch: int = 1) -> Tensors:
        """The text's tokens of each, and then padding up to the padding's length, where the text is not longer."""
        lengths = [max(text, few) for few in FEW]
        if text > 20:
            lengths[1] = text + 5
        # Tokens before the last ones are kept whatever the mask says; so does ComfyUI keep them.
        masks = [
            (torch.arange(n) < max(min(text, n) - 3, n - few)).long()[None].expand(batch, -1)
            for n, few in zip(lengths, FEW, strict=True)
        ]
        return {
            "context": normal(batch, lengths[0], 64, seed=text),
            "context_t5": normal(batch, lengths[1], 64, seed=text + 1),
            "mask": masks[0],
            "mask_t5": masks[1],
        }

    sizes = ((16, 16), (11, 18), (26, 9))
    return Case("hunyuandit", make, conditioning, reference, t=700.0, predicts="v", channels=4, sizes=sizes)


# ---------------------------------------------------------------------------------------------------------- SDXL


def _sdxl() -> Case:
    facts = sdxl_facts(context_width=64)

    def make(path: Path) -> Path:
        return make_sdxl(path, facts, dtype=torch.float32)

    def reference(path: Path, dtype: torch.dtype = torch.float32) -> Predict:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        from xditd.catalog.layouts.sdxl import pieces
        from xditd.models.sdxl.config import config

        module = module_of(UNet2DConditionModel, config(facts), pieces(facts), path, dtype)

        @torch.no_grad()
        def predict(x: torch.Tensor, t: torch.Tensor, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
            out: torch.Tensor = module(
                x, t, given["context"], class_labels=given["vector"], return_dict=False
            )[0]
            return out

        return computing(dtype, predict)

    def conditioning(text: int, batch: int = 1) -> Tensors:
        return {"context": normal(batch, text, 64, seed=text), "vector": normal(batch, 2816, seed=text + 1)}

    sizes = ((32, 32), (11, 9), (18, 22))
    return Case("sdxl", make, conditioning, reference, t=700.0, channels=4, parallel=False, sizes=sizes)


CASES = {
    "sd3": _sd3(),
    "sd3.5_large": _sd3(qk_norm=True),
    "sd3.5_medium": _sd3(qk_norm=True, dual_blocks=2),
    "pixart_sigma": _pixart(),
    "pixart_alpha": _pixart(sizes=True, positions=64),
    "hunyuandit_1.2": _hunyuandit(blocks=10),  # several skip connections lead from any stage
    "hunyuandit_1.1": _hunyuandit(sizes=True),
    "sdxl": _sdxl(),
}
