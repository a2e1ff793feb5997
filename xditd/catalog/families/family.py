"""What a family's module has: the contract between detection, the daemon's checks and the families."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from xditd.catalog.header import Header
from xditd.protocol.messages import EncodeText, ModelInfo, Plan, Sample
from xditd.protocol.noise import Noise
from xditd.protocol.tensors import Tensor


@dataclass(frozen=True, slots=True)
class Detected:
    """What the keys and shapes of a file say.

    Attributes:
        variant: of the family: "dev", "schnell".
        facts: widths, depths, heads, channels: what the shapes say.
        keys: the file's keys that belong to the model, with their prefix.
        names: of a file in diffusers' layout: by parameter of the network, the file's key; of one in the makers' {}.
    """

    variant: str
    facts: dict[str, int] = field(default_factory=dict)
    keys: frozenset[str] = frozenset()
    names: Mapping[str, str] = field(default_factory=dict)


class Family(Protocol):
    """A family of models. Every check raises XditError with one sentence that says what would work."""

    name: str
    label: str  # as a sentence names one of it: "a Flux transformer"
    part: str  # what it is in the making of a picture: "transformer", "vae", "text_encoder"; "" is never in a file
    parallel: bool  # whether more than one device can hold a model of it
    # what keys of its layers begin with that can be on a device one by one, a regular expression; "": there are none
    layers: str
    dtypes: tuple[str, ...]  # that it computes right in

    def detect(self, header: Header, prefix: str) -> Detected | None:
        """What the file holds under the prefix, or None where it is not of this family.

        Raises:
            XditError: `file_invalid` naming the key where shapes contradict each other or keys are missing,
                `not_built` for a kind of the family that this version has not.
        """

    def parameters(self, facts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Every parameter of a model with these facts, by key of its makers' files: its shape."""

    def check_plan(self, info: ModelInfo, plan: Plan) -> None:
        """Refuses a plan that this model cannot run under: `bad_plan`, or `not_built`."""


Kinds = tuple[str, ...]
"""Of "text" and "image", those whose tokens an attention has as keys."""


class Transformer(Family, Protocol):
    """One that denoises. In its checks, `conditioning` is the tensors of one PutConditioning, as `check_conditioning`
    passed them."""

    def noise(self, facts: Mapping[str, int]) -> Noise:
        """What kind of noise a model with these facts takes out of a latent."""

    def attention(self, facts: Mapping[str, int]) -> tuple[Kinds, ...]:
        """Each kind of attention among tokens that ranks deal out; () of a model whose tokens are not."""

    def check_conditioning(
        self, info: ModelInfo, tensors: Mapping[str, Tensor], values: Mapping[str, float]
    ) -> None:
        """Refuses tensors and values of a PutConditioning: `bad_tensor`, `bad_value`."""

    def check_denoise(
        self,
        info: ModelInfo,
        x: Tensor,
        t: tuple[float, ...],
        conditioning: Mapping[str, Tensor],
        out: Tensor | None = None,
    ) -> None:
        """Refuses one item of a Denoise: `bad_tensor`, `bad_value`."""

    def check_sample(
        self,
        info: ModelInfo,
        message: Sample,
        conditioning: Mapping[str, Tensor],
        negative: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Refuses a Sample: `bad_tensor`, `bad_value`. `negative` is the tensors of `message.negative`."""


class Autoencoder(Family, Protocol):
    """One that makes pictures of latents, and latents of pictures."""

    def check_decode(self, info: ModelInfo, latent: Tensor, out: Tensor | None = None, tile: int = 0) -> None:
        """Refuses a Decode: `bad_tensor`, `bad_value`."""

    def check_encode(self, info: ModelInfo, image: Tensor, out: Tensor | None = None, tile: int = 0) -> None:
        """Refuses an Encode: `bad_tensor`, `bad_value`."""


class TextEncoder(Family, Protocol):
    """One that makes hidden states of tokens."""

    def check_encode_text(self, info: ModelInfo, message: EncodeText) -> None:
        """Refuses an EncodeText: `bad_tensor`, `bad_value`."""
