"""A prompt in the demo model's words as conditioning, by the daemon's text encoders: for programs without ComfyUI."""

from __future__ import annotations

from array import array
from typing import Any

from xditd.client import Client
from xditd.client.buffers import Buffer
from xditd.demo import prompt
from xditd.protocol.errors import Code, XditError
from xditd.protocol.plans import ModelRef

FLUX = ModelRef(kind="diffusion_models", name="xditd-demo.safetensors")
VAE = ModelRef(kind="vae", name="xditd-demo-vae.safetensors")
CLIP = ModelRef(kind="text_encoders", name="xditd-demo-clip_l.safetensors")
T5 = ModelRef(kind="text_encoders", name="xditd-demo-t5xxl.safetensors")


def encode(client: Client, text: str) -> dict[str, Any]:
    """What the demo's model is conditioned with, as ComfyUI has it of a Flux model: of "" for an empty prompt.

    Returns:
        context [1, 256, 64] and pooled [1, 16], float32 `Buffer`s.

    Raises:
        XditError: as `prompt.tokens`; `model_not_visible` where the daemon does not list the demo's models.
    """
    words = prompt.tokens(text)
    _, pooled = client.encode_text(CLIP, _row(words.clip), pooled="plain")
    context, _ = client.encode_text(T5, _row(words.t5))
    return {"context": context, "pooled": pooled}


def expect(client: Client) -> None:
    """Makes sure that a daemon has the demo's models.

    Raises:
        XditError: `model_not_visible`, with what to configure.
    """
    listed = {(info.kind, info.name) for info in client.models().models}
    if any((model.kind, model.name) not in listed for model in (FLUX, VAE, CLIP, T5)):
        raise XditError(
            Code.MODEL_NOT_VISIBLE,
            f"This daemon does not list the demo's models: add the folders below {prompt.folder()} to its [models.folders], "
            "or leave --endpoint out and the demo brings a daemon of its own.",
        )


def _row(tokens: tuple[int, ...]) -> Buffer:
    return Buffer(array("i", tokens), "int32", (1, len(tokens)))
