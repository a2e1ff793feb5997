"""The families that can be loaded, and the one way to load one. A new family is a folder here and a row."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from xditd.catalog.detection import prefixes, role
from xditd.catalog.families import TRANSFORMERS, family
from xditd.catalog.layouts import named
from xditd.models.lora import Loras
from xditd.models.reading import Progress, WeightFile
from xditd.models.splits import Cut, Divide
from xditd.models.stages import Stages
from xditd.models.tokens import Tokens
from xditd.models.weights import Weights
from xditd.protocol.errors import Code, XditError
from xditd.protocol.noise import Noise


@dataclass(frozen=True, slots=True)
class Row:
    """One family: what part of an image's making it is, and the module whose `load` makes its network."""

    part: str  # "transformer", "vae" or "text_encoder"
    module: str  # imported when it is needed: diffusers and transformers take seconds
    stages: str = ""  # the module whose `Staged` takes the network apart into stages, where there is one


FAMILIES = {
    "flux": Row("transformer", "xditd.models.flux.network", "xditd.models.flux.stages"),
    "sd3": Row("transformer", "xditd.models.sd3.network", "xditd.models.sd3.stages"),
    "pixart": Row("transformer", "xditd.models.pixart.network", "xditd.models.pixart.stages"),
    "hunyuandit": Row("transformer", "xditd.models.hunyuandit.network"),
    "sdxl": Row("transformer", "xditd.models.sdxl.network"),
    "autoencoder_kl": Row("vae", "xditd.models.vae.network"),
    "clip": Row("text_encoder", "xditd.models.clip.network"),
    "t5": Row("text_encoder", "xditd.models.t5.network"),
    "bert": Row("text_encoder", "xditd.models.bert.network"),
}


class Transformer(Protocol):
    """What a transformer family's `load` returns."""

    backbone: Any
    call: Any  # runs the backbone: at first `partial(run, backbone)`
    heads: int
    tokens: Tokens  # what `call` has by token
    cuts: Mapping[str, Cut]  # by parameter, what of it is held where a rank holds a share
    noise: Noise  # that it takes out of a latent
    device: torch.device
    dtype: torch.dtype
    loras: Loras  # what is merged into its weights; `load` gives it that

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
            network = importlib.import_module(row.module)
            shared = () if divide is None else (divide,)
            loaded = network.load(file, found.facts, prefix, device, dtype, *shared)
            if row.part == "transformer":
                loaded.noise = TRANSFORMERS[name].noise(found.facts)
                loaded.loras = Loras(file, name, found.facts, device, dtype)
            loaded.weights = Weights(file, device)
            return loaded
    raise XditError(Code.FILE_INVALID, f"{file.header.name} holds no {name}; choose the model's own file.")


def in_stages(name: str, network: Any) -> Stages:
    """A transformer that `load` returned, in stages.

    Raises:
        XditError: `not_built` for a family that has none.
    """
    row = FAMILIES[name]
    if not row.stages:
        raise XditError(Code.NOT_BUILT, f"pipefusion is not built for {name} in this version.")
    stages: Stages = importlib.import_module(row.stages).Staged(network)
    return stages
