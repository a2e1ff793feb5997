"""The CLIP: ComfyUI's tokenizers, prompt weights and joining of texts, around text encoders that are elsewhere."""

from __future__ import annotations

import logging
import numbers
from collections.abc import Sequence
from typing import Any, NoReturn

import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.text_encoders.flux
import comfy.text_encoders.sd3_clip
import folder_paths
import torch

from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelInfo

from . import daemon
from .dispatcher import Dispatcher
from .patcher import RemotePatcher

log = logging.getLogger("xditd.nodes")

Encoder = tuple[Dispatcher, ModelInfo]
"""Where a text encoder is, and what it is."""

TYPES = ("flux", "sd3")
"""Types of ComfyUI's CLIP loaders that are built."""


class RemoteEncoder(comfy.sd1_clip.SDClipModel):
    """One text encoder. Options and the interpolation of weighted tokens are ComfyUI's."""

    def __init__(
        self,
        encoder: Encoder,
        *,
        special_tokens: dict[str, int],
        layer: str = "last",
        layer_idx: int | None = None,
        layer_norm_hidden_state: bool = True,
        return_projected_pooled: bool = True,
        has_pooled: bool = True,
    ) -> None:
        torch.nn.Module.__init__(self)
        self.dispatcher, info = encoder
        self.has_pooled = has_pooled
        self.projects = bool(info.facts.get("projection"))  # without one, ComfyUI's is the identity
        self.num_layers, self.width = info.facts["layers"], info.facts["width"]
        self.special_tokens = special_tokens
        self.layer, self.layer_idx = layer, layer_idx
        self.layer_norm_hidden_state = layer_norm_hidden_state
        self.return_projected_pooled = return_projected_pooled
        self.execution_device: torch.device | None = None
        self.options_default = (layer, layer_idx, return_projected_pooled)

    def forward(self, sections: Sequence[Sequence[Any]]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states [n, tokens, width] and pooled [n, width] of sections of equal length.

        A token is its number, or a textual inversion's vector.
        """
        if self.layer not in ("last", "hidden"):
            raise XditError(
                Code.NOT_BUILT, f"A CLIP loaded by xDiT has no output of the layers {self.layer} yet."
            )
        pooled_as = "projected" if self.return_projected_pooled and self.projects else "plain"
        vectors: list[torch.Tensor] = []
        rows = [self._row(section, vectors) for section in sections]
        spec = self.dispatcher
        hidden, pooled = daemon.patiently(
            lambda: daemon.client(spec.endpoint).encode_text(
                spec.model,
                torch.tensor(rows, dtype=torch.int32),
                spec.plan,
                vectors=torch.stack(vectors) if vectors else None,
                layer=None if self.layer == "last" else self.layer_idx,
                final_norm=self.layer_norm_hidden_state,
                pooled=pooled_as if self.has_pooled else "none",
                on_event=daemon.telling(spec.model.name),
                interrupt=daemon.interrupt,
            ),
        )
        device = self.execution_device or torch.device("cpu")
        # Clones: ComfyUI writes weights into them, and keeps them for as long as the prompt does not change.
        return hidden.to(device, copy=True), None if pooled is None else pooled.to(device, copy=True)

    def _row(self, section: Sequence[Any], vectors: list[torch.Tensor]) -> list[int]:
        """Numbers of tokens; −1 − i stands for the i-th vector. As in ComfyUI, a vector that does not fit is left out."""
        row, left_out = [], 0
        for token in section:
            if isinstance(token, numbers.Integral):
                row.append(int(token))
                continue
            vector = _vector(token)
            if vector.shape[-1] == self.width:
                vectors.append(vector)
                row.append(-len(vectors))
            else:
                left_out += 1
        if left_out:
            log.warning("An embedding has vectors that are not %d wide, and is left out.", self.width)
        return row + [self.special_tokens["pad"]] * left_out

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise XditError(
            Code.NOT_BUILT,
            "A CLIP loaded by xDiT has no weights in ComfyUI, which LoRA loaders and saving need; use the stock "
            "Load CLIP for that.",
        )


def make_clip(kind: str, encoders: Sequence[Encoder]) -> Any:
    """The CLIP of a type of ComfyUI's loaders.

    Args:
        encoders: in any order; what they are tells what they are for.

    Raises:
        XditError: `not_built` for another type, `bad_value` where encoders are missing, or there twice.
    """
    if kind not in TYPES:
        raise XditError(
            Code.NOT_BUILT,
            f"Text encoders of the type {kind} are not built yet; {' and '.join(TYPES)} are. Use the stock loader.",
        )
    found: dict[str, Encoder] = {}
    for encoder in encoders:
        name = _name(encoder[1])
        if name in found:
            raise XditError(
                Code.BAD_VALUE,
                f"{found[name][1].name} and {encoder[1].name} are both a {name}; choose one of them.",
            )
        found[name] = encoder
    stage, tokenizer = _flux(found) if kind == "flux" else _sd3(found)
    stage.dtypes = {torch.float32}
    clip = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model = stage
    clip.tokenizer = tokenizer(
        embedding_directory=folder_paths.get_folder_paths("embeddings"), tokenizer_data={}
    )
    clip.patcher = RemotePatcher(
        stage,
        load_device=comfy.model_management.text_encoder_device(),
        offload_device=comfy.model_management.text_encoder_offload_device(),
        size=1,
    )
    clip.patcher.is_clip = True
    clip.layer_idx, clip.use_clip_schedule, clip.apply_hooks_to_conds = None, False, None
    clip.tokenizer_options = {}
    return clip


def _flux(found: dict[str, Encoder]) -> tuple[Any, Any]:
    _want(found, "flux", ("clip_l", "t5xxl"))
    stage = _without_weights(comfy.text_encoders.flux.FluxClipModel)
    stage.clip_l = _clip(found["clip_l"], return_projected_pooled=False)
    stage.t5xxl = _t5(found["t5xxl"])
    return stage, comfy.text_encoders.flux.FluxTokenizer


def _sd3(found: dict[str, Encoder]) -> tuple[Any, Any]:
    _want(found, "sd3", (), ("clip_l", "clip_g", "t5xxl"))
    stage = _without_weights(comfy.text_encoders.sd3_clip.SD3ClipModel)
    inner = {"layer": "hidden", "layer_idx": -2, "layer_norm_hidden_state": False}
    stage.clip_l = (
        _clip(found["clip_l"], return_projected_pooled=False, **inner) if "clip_l" in found else None
    )
    stage.clip_g = _clip(found["clip_g"], pad=0, **inner) if "clip_g" in found else None
    stage.t5xxl = _t5(found["t5xxl"]) if "t5xxl" in found else None
    stage.t5_attention_mask = False
    return stage, comfy.text_encoders.sd3_clip.SD3Tokenizer


def _clip(encoder: Encoder, *, pad: int = 49407, **options: Any) -> RemoteEncoder:
    return RemoteEncoder(encoder, special_tokens={"start": 49406, "end": 49407, "pad": pad}, **options)


def _t5(encoder: Encoder) -> RemoteEncoder:
    return RemoteEncoder(encoder, special_tokens={"end": 1, "pad": 0}, has_pooled=False)


def _without_weights(kind: type[torch.nn.Module]) -> Any:
    """An instance whose text encoders are still to be set."""
    stage = kind.__new__(kind)
    torch.nn.Module.__init__(stage)
    return stage


def _vector(token: Any) -> torch.Tensor:
    """A textual inversion's vector, as either version of ComfyUI's tokenizer gives it."""
    data = token.get("data") if isinstance(token, dict) and token.get("type") == "embedding" else token
    if not isinstance(data, torch.Tensor):
        raise XditError(
            Code.NOT_BUILT, "A CLIP loaded by xDiT takes text and textual inversions, and nothing else."
        )
    return data.reshape(-1).float()


def _name(info: ModelInfo) -> str:
    """Which of ComfyUI's text encoders a model is."""
    return "t5xxl" if info.family == "t5" else info.variant


def _want(
    found: dict[str, Encoder], kind: str, needed: Sequence[str], taken: Sequence[str] | None = None
) -> None:
    missing = [name for name in needed if name not in found]
    strange = [name for name in found if name not in (taken or needed)]
    if missing or strange or not found:
        names = ", ".join(found) or "none"
        raise XditError(
            Code.BAD_VALUE,
            f"The type {kind} takes {' and '.join(needed) or ', '.join(taken or ())}; these files are {names}.",
        )
