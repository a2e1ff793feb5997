"""The VAE: ComfyUI's own around a leaf that is elsewhere. Batches, crops and tiles are ComfyUI's."""

from __future__ import annotations

from typing import Any, NoReturn

import comfy.sd
import torch

from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelInfo

from . import daemon
from .dispatcher import Dispatcher
from .patcher import RemotePatcher

WHOLE = 0
"""As the daemon counts tiles: none. Where memory runs out the tiles are ComfyUI's, as they are without us."""


class RemoteAutoencoder(torch.nn.Module):
    """What ComfyUI takes for the VAE's network. Images are [B, 3, H, W], black 0 and white 1; latents [B, C, h, w]."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        super().__init__()
        self.dispatcher = dispatcher

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return self._ask("decode", latent, clamp=False, tile=WHOLE).movedim(-1, 1)

    def encode(self, image: torch.Tensor) -> torch.Tensor:
        return self._ask("encode", image.movedim(1, -1), tile=WHOLE)

    def _ask(self, verb: str, tensor: torch.Tensor, **options: int) -> torch.Tensor:
        spec = self.dispatcher
        ask = getattr(daemon.client(spec.endpoint), verb)
        try:
            result: torch.Tensor = daemon.patiently(
                lambda: ask(
                    spec.model,
                    tensor,
                    spec.plan,
                    on_event=daemon.telling(spec.model.name),
                    interrupt=daemon.interrupt,
                    **options,
                ),
            )
        except XditError as error:
            if error.code == Code.OUT_OF_MEMORY:  # ComfyUI then does it in tiles, and says so
                raise torch.OutOfMemoryError(error.message) from error
            raise
        return result.to(tensor.device)

    def state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise XditError(
            Code.NOT_BUILT,
            "A VAE loaded by xDiT has no weights in ComfyUI to be saved or patched; use the stock Load VAE for that.",
        )


class RemoteVAE(comfy.sd.VAE):
    """A VAE as ComfyUI's nodes use it."""

    def __init__(self, dispatcher: Dispatcher, info: ModelInfo) -> None:
        # Whatever this version of ComfyUI's VAE has, it has from its own making of the smallest one there is.
        super().__init__(sd={"pixel_space_vae": torch.tensor(1.0)})
        leaf = self.first_stage_model = RemoteAutoencoder(dispatcher)
        self.patcher = RemotePatcher(
            leaf, load_device=self.device, offload_device=torch.device("cpu"), size=1
        )
        self.vae_dtype = torch.float32
        self.working_dtypes = [torch.float32]
        self.latent_channels = info.facts["latent_channels"]
        self.latent_dim, self.output_channels = 2, 3
        self.upscale_ratio = self.downscale_ratio = info.facts["scale"]
        self.process_input = _same  # the daemon has images in 0..1
        self.process_output = _cut  # after tiles are blended, as ComfyUI does
        self.memory_used_encode = self.memory_used_decode = (
            _one  # none of ComfyUI's memory: a batch goes whole
        )

    def get_sd(self) -> Any:
        return self.first_stage_model.state_dict()


def _same(image: torch.Tensor) -> torch.Tensor:
    return image


def _cut(image: torch.Tensor) -> torch.Tensor:
    return image.clamp_(0.0, 1.0)


def _one(shape: Any, dtype: Any) -> int:
    return 1


def missing_vae() -> Any:
    """The VAE of a checkpoint that has none: ComfyUI's nodes then say so in their own words."""
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    vae.first_stage_model = None
    return vae
