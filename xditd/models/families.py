"""The families that can be loaded, and the one way to load one. A new family is a folder here and a row."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from xditd.catalog.detection import prefixes, role
from xditd.catalog.families import TRANSFORMERS, family
from xditd.catalog.layouts import named
from xditd.catalog.layouts.piece import Piece
from xditd.models.filling import fill, unfilled
from xditd.models.lora import Loras
from xditd.models.offload import Offload
from xditd.models.reading import Keeper, Progress, WeightFile
from xditd.models.splits import Divide
from xditd.models.stages import Stages
from xditd.models.storage import Storage
from xditd.models.tokens import Tokens
from xditd.models.weights import Weights
from xditd.protocol.errors import Code, XditError
from xditd.protocol.noise import Noise


@dataclass(frozen=True, slots=True)
class Row:
    """One family: what part of an image's making it is, and the class of its networks."""

    part: str  # "transformer", "vae" or "text_encoder"
    folder: str  # below xditd.models; imported when it is needed: diffusers and transformers take seconds
    network: str  # the class in its network.py, a `Network`
    staged: bool = False  # whether its stages.py has a `Staged` that takes the network apart into stages
    # names of the lists of layers that can come and go one by one (`models.offload`), in which * stands for anything
    layers: tuple[str, ...] = ()
    # names of parameters, likewise, that ComfyUI has in float32 whatever its `weight_dtype`
    exempt: tuple[str, ...] = ()

    @property
    def kind(self) -> type[Network]:
        module = importlib.import_module(f"xditd.models.{self.folder}.network")
        found: type[Network] = getattr(module, self.network)
        return found


FAMILIES = {
    "flux": Row("transformer", "flux", "Flux", True, ("transformer_blocks", "single_transformer_blocks")),
    "sd3": Row("transformer", "sd3", "SD3", True, ("transformer_blocks",)),
    "pixart": Row(
        "transformer", "pixart", "PixArt", True, ("transformer_blocks",), exempt=("*scale_shift_table",)
    ),
    "hunyuandit": Row("transformer", "hunyuandit", "HunyuanDiT", True, ("blocks",)),
    "sdxl": Row("transformer", "sdxl", "SDXL", layers=("*.transformer_blocks",)),
    "autoencoder_kl": Row("vae", "vae", "Autoencoder"),
    "clip": Row("text_encoder", "clip", "Clip", layers=("*.encoder.layers",)),
    "t5": Row("text_encoder", "t5", "T5", layers=("block",)),
    "bert": Row("text_encoder", "bert", "Bert", layers=("encoder.layer",)),
}


class Network(Protocol):
    """What the class of every family has: how its networks are made, and what `load` adds to each."""

    splits: Any  # a transformer's `Splits`, where its layers can be divided
    weights: Weights

    @staticmethod
    def empty(facts: Mapping[str, int]) -> nn.Module:
        """The module that these facts describe. Made while `filling.unfilled`: its parameters are read afterwards."""

    @staticmethod
    def pieces(facts: Mapping[str, int], prefix: str) -> Mapping[str, Piece]:
        """Where each parameter of that module is in a file, whose keys have a prefix."""

    def __init__(
        self, backbone: Any, facts: Mapping[str, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        """Around a module that has its parameters, on a device and in the dtype of its arithmetic."""


class Transformer(Protocol):
    """A transformer that `load` returned."""

    backbone: Any
    call: Any  # runs the backbone: at first `partial(run, backbone)`
    heads: int
    tokens: Tokens  # what `call` has by token
    noise: Noise  # that it takes out of a latent
    device: torch.device
    dtype: torch.dtype
    loras: Loras  # what is merged into its weights
    weights: Weights

    def condition(self, tensors: Mapping[str, torch.Tensor], values: Mapping[str, float]) -> Any:
        """A conditioning from what a client put."""

    def predict(self, x: torch.Tensor, t: torch.Tensor, conditioning: Any) -> torch.Tensor:
        """The network's raw output at x."""

    def run(self, module: Any, **keywords: Any) -> torch.Tensor:
        """One call of a module, the backbone or what wraps it, on all tokens or on some: the tokens that it predicts."""


def load(
    name: str,
    path: str | os.PathLike[str],
    part: str,
    device: torch.device,
    dtype: torch.dtype,
    divide: Divide | None = None,
    progress: Progress | None = None,
    offload: str = "",
    keeper: Keeper | None = None,
    weight_dtype: str = "",
) -> Any:
    """The network of a model file.

    Args:
        name: of the family.
        path: of the file or folder.
        part: of the file, one of `catalog.detection.PREFIXES`.
        device: where it goes.
        dtype: of its arithmetic.
        divide: what leaves a rank its share of a transformer; None loads the whole.
        progress: told of bytes that are in place.
        offload: "model" or "layerwise": its weights are on the device in turns alone (`weights.offload.turn`); "": always.
        keeper: has what `divide` left of some parameters.
        weight_dtype: in what its layers' weights are kept (`models.storage`); "": in `dtype`.

    Returns:
        A `Transformer`, a `vae.network.Autoencoder` or a `text.TextEncoder`, with its `weights`.

    Raises:
        XditError: `unknown_family`, `file_invalid` and what else `catalog` finds wrong with the file.
    """
    row = FAMILIES.get(name)
    if row is None:
        raise XditError(
            Code.UNKNOWN_FAMILY, f"No family {name!r} can be loaded; there are {', '.join(FAMILIES)}."
        )
    if row.part != role(part):
        raise XditError(Code.UNKNOWN_FAMILY, f"{name} is a {row.part}; it cannot be loaded as a {part}.")
    file = WeightFile(path, progress)
    for prefix in prefixes(file.header, part):
        found = named.detect(family(name), file.header, prefix)
        if found is not None:
            file.names = found.names
            kind = row.kind
            with unfilled():
                backbone = kind.empty(found.facts)
            cuts = None if divide is None else divide(backbone, kind.splits)
            pieces = {name: Piece(key) for name, key in file.names.items()}
            pieces = pieces or dict(kind.pieces(found.facts, prefix))
            storage = moving = None
            if weight_dtype:
                storage = Storage(weight_dtype, backbone, row.layers, row.exempt, pieces, file, dtype)
            dtypes = {} if storage is None else storage.dtypes
            if offload:
                layers = row.layers if offload == "layerwise" else ()
                moving = Offload(backbone, layers, file, device, dtype, dtypes)
            fill(backbone, pieces, file, device, dtype, cuts, moving or keeper, dtypes)
            if storage is not None:
                file.placed = storage.adopt(file.placed)
            loaded: Any = kind(backbone, found.facts, device, dtype)
            if row.part == "transformer":
                loaded.noise = TRANSFORMERS[name].noise(found.facts)
                loaded.loras = Loras(file, name, found.facts, device, dtype)
            loaded.weights = Weights(file, device, moving, storage)
            return loaded
    raise XditError(Code.FILE_INVALID, f"{file.header.name} holds no {name}; choose the model's own file.")


def in_stages(name: str, network: Any) -> Stages:
    """A transformer that `load` returned, in stages.

    Raises:
        XditError: `not_built` for a family that has none.
    """
    row = FAMILIES[name]
    if not row.staged:
        raise XditError(Code.NOT_BUILT, f"pipefusion is not built for {name} in this version.")
    stages: Stages = importlib.import_module(f"xditd.models.{row.folder}.stages").Staged(network)
    return stages
