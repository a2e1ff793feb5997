"""The CLIP: ComfyUI's tokenizers, prompt weights and joining of texts, around text encoders that are elsewhere."""

from __future__ import annotations

import logging
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.text_encoders.flux
import comfy.text_encoders.hydit
import comfy.text_encoders.pixart_t5
import comfy.text_encoders.sd3_clip
import folder_paths
import torch
from safetensors import safe_open

from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelInfo

from . import daemon
from .dispatcher import Dispatcher
from .patcher import RemotePatcher

log = logging.getLogger("xditd.nodes")

Encoder = tuple[Dispatcher, ModelInfo]
"""Where a text encoder is, and what it is."""

TYPES = ("flux", "sd3", "sdxl", "pixart", "hunyuan_dit")
"""Types of ComfyUI's CLIP loaders that are built."""

TOKENIZER = "spiece_model"
"""Where a file of mT5 has its tokenizer, by the end of the key."""


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
        masks: bool = False,
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
        self.masks = masks
        self.transformer = Unembedded(self.width)  # which ComfyUI asks for the vectors of tokens
        self.execution_device: torch.device | None = None
        self.options_default = (layer, layer_idx, return_projected_pooled)

    def forward(self, sections: Sequence[Sequence[Any]]) -> Any:
        """Hidden states [n, tokens, width] and pooled [n, width] of sections of equal length; with `masks` their
        attention mask [n, tokens] too, by which tokens after a text's end are not attended to.

        A token is its number, or a textual inversion's vector.
        """
        if self.layer not in ("last", "hidden"):
            raise XditError(
                Code.NOT_BUILT, f"A CLIP loaded by xDiT has no output of the layers {self.layer} yet."
            )
        pooled_as = "projected" if self.return_projected_pooled and self.projects else "plain"
        vectors: list[torch.Tensor] = []
        rows = [self._row(section, vectors) for section in sections]
        # Which of them are text is ComfyUI's own finding, and differs between its versions.
        mask = self.process_tokens(sections, torch.device("cpu"))[1] if self.masks else None
        spec = self.dispatcher
        hidden, pooled = daemon.patiently(
            lambda: daemon.client(spec.endpoint).encode_text(
                spec.model,
                torch.tensor(rows, dtype=torch.int32),
                spec.plan,
                vectors=torch.stack(vectors) if vectors else None,
                mask=mask,
                layer=None if self.layer == "last" else self.layer_idx,
                final_norm=self.layer_norm_hidden_state,
                pooled=pooled_as if self.has_pooled else "none",
                on_event=daemon.telling(spec.model.name),
                interrupt=daemon.interrupt,
            ),
        )
        device = self.execution_device or torch.device("cpu")
        # Clones: ComfyUI writes weights into them, and keeps them for as long as the prompt does not change.
        outputs = hidden.to(device, copy=True), None if pooled is None else pooled.to(device, copy=True)
        return outputs if mask is None else (*outputs, {"attention_mask": mask.to(device)})

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


class RemotePixArtEncoder(RemoteEncoder):
    """PixArt's T5, whose weighted tokens are measured from padding alone, as ComfyUI has it."""

    gen_empty_tokens = comfy.text_encoders.pixart_t5.T5XXLModel.gen_empty_tokens


class Unembedded:
    """Stands for a transformer where ComfyUI wants no more of it than how many tokens there are, and how wide."""

    def __init__(self, width: int) -> None:
        self.width = width

    def get_input_embeddings(self) -> Any:
        return lambda tokens, out_dtype: torch.zeros(*tokens.shape, self.width, dtype=out_dtype)


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
            f"Text encoders of the type {kind} are not built yet; {', '.join(TYPES)} are. Use the stock loader.",
        )
    found: dict[str, Encoder] = {}
    for encoder in encoders:
        name = _name(encoder[1], kind)
        if name in found:
            raise XditError(
                Code.BAD_VALUE,
                f"{found[name][1].name} and {encoder[1].name} are both a {name}; choose one of them.",
            )
        found[name] = encoder
    stage, tokenizer, *data = STAGES[kind](found)
    stage.dtypes = {torch.float32}
    clip = comfy.sd.CLIP(no_init=True)
    clip.cond_stage_model = stage
    clip.tokenizer = tokenizer(
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        tokenizer_data=data[0] if data else {},
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


def _sdxl(found: dict[str, Encoder]) -> tuple[Any, Any]:
    _want(found, "sdxl", ("clip_l", "clip_g"))
    stage = _without_weights(comfy.sdxl_clip.SDXLClipModel)
    inner = {"layer": "hidden", "layer_idx": -2, "layer_norm_hidden_state": False}
    stage.clip_l = _clip(found["clip_l"], **inner)
    stage.clip_g = _clip(found["clip_g"], pad=0, **inner)
    return stage, comfy.sdxl_clip.SDXLTokenizer


def _pixart(found: dict[str, Encoder]) -> tuple[Any, Any]:
    _want(found, "pixart", ("t5xxl",))
    stage = _without_weights(comfy.text_encoders.pixart_t5.PixArtT5XXL)
    stage.clip_name = stage.clip = "t5xxl"
    stage.t5xxl = _t5(found["t5xxl"], RemotePixArtEncoder)
    return stage, comfy.text_encoders.pixart_t5.PixArtTokenizer


def _hunyuan_dit(found: dict[str, Encoder]) -> tuple[Any, Any, dict[str, Any]]:
    _want(found, "hunyuan_dit", ("hydit_clip", "mt5xl"))
    stage = _without_weights(comfy.text_encoders.hydit.HyditModel)
    stage.hydit_clip = RemoteEncoder(
        found["hydit_clip"], special_tokens={"start": 101, "end": 102, "pad": 0}, has_pooled=False, masks=True
    )
    stage.mt5xl = _t5(found["mt5xl"], masks=True)
    data = {f"mt5xl.{TOKENIZER}": _tokenizer(found["mt5xl"][0])}
    return stage, comfy.text_encoders.hydit.HyditTokenizer, data


STAGES: dict[str, Callable[[dict[str, Encoder]], tuple[Any, ...]]] = {
    "flux": _flux,
    "sd3": _sd3,
    "sdxl": _sdxl,
    "pixart": _pixart,
    "hunyuan_dit": _hunyuan_dit,
}
"""By type: ComfyUI's model of several encoders, the class of its tokenizer, and what that has to be given of a file."""


def _tokenizer(dispatcher: Dispatcher) -> torch.Tensor:
    """The tokenizer in a file, which ComfyUI has not of itself.

    Raises:
        XditError: `bad_value` where the file has none.
    """
    path = folder_paths.get_full_path_or_raise(dispatcher.model.kind, dispatcher.model.name)
    with safe_open(path, framework="pt") as file:
        key = next((key for key in file.keys() if key.endswith(TOKENIZER)), None)  # noqa: SIM118
        if key is None:
            raise XditError(
                Code.BAD_VALUE,
                f"{dispatcher.model.name} has no {TOKENIZER}, the tokenizer that a HunyuanDiT's texts need; use the "
                "all-in-one checkpoint, or an mT5 file that ComfyUI's CLIPSave wrote of it.",
            )
        found: torch.Tensor = file.get_tensor(key)
    return found


def _clip(encoder: Encoder, *, pad: int = 49407, **options: Any) -> RemoteEncoder:
    return RemoteEncoder(encoder, special_tokens={"start": 49406, "end": 49407, "pad": pad}, **options)


def _t5(encoder: Encoder, kind: type[RemoteEncoder] = RemoteEncoder, masks: bool = False) -> RemoteEncoder:
    return kind(encoder, special_tokens={"end": 1, "pad": 0}, has_pooled=False, masks=masks)


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


def _name(info: ModelInfo, kind: str) -> str:
    """Which of ComfyUI's text encoders a model is."""
    t5 = "mt5xl" if kind == "hunyuan_dit" else "t5xxl"
    return {"t5": t5, "bert": "hydit_clip"}.get(info.family, info.variant)


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
