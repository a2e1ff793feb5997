"""Tensors and pictures as files, and noise: what a command line hands the client. Imports torch lazily.

Every function says what to install where torch, safetensors or pillow are not there.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xditd.protocol.errors import Code, XditError

if TYPE_CHECKING:
    import torch


def read_tensors(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Every tensor of a safetensors file, on the CPU.

    Raises:
        XditError: `file_invalid` where there is none or it is not such a file.
    """
    _needed("torch")
    safetensors = _needed("safetensors.torch")
    try:
        return safetensors.load_file(path)
    except OSError as error:
        raise XditError(Code.FILE_INVALID, f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # SafetensorError is not exported under one name by all versions
        raise XditError(Code.FILE_INVALID, f"{path} is not a safetensors file: {error}.") from error


def read_latent(path: str | os.PathLike[str]) -> torch.Tensor:
    """A latent [B, C, h, w], float32: a file's only tensor, or the one that ComfyUI's SaveLatent wrote.

    Raises:
        XditError: `file_invalid`.
    """
    tensors = read_tensors(path)
    latent = tensors.get("latent_tensor")
    if latent is None and len(tensors) == 1:
        (latent,) = tensors.values()
    if latent is None:
        raise XditError(
            Code.FILE_INVALID,
            f'{path} has the tensors {", ".join(tensors)}; a latent is the only one, or is named "latent_tensor".',
        )
    if latent.ndim != 4:
        raise XditError(
            Code.FILE_INVALID,
            f"The latent in {path} has shape {list(latent.shape)}; it must be [B, C, h, w].",
        )
    return latent.float().contiguous()


def write_latent(path: str | os.PathLike[str], latent: torch.Tensor) -> None:
    """A latent [B, C, h, w], unscaled, as ComfyUI's LoadLatent reads it; there whole or not at all."""
    torch = _needed("torch")
    safetensors = _needed("safetensors.torch")
    # Without the second name LoadLatent takes the file for one of its oldest, and scales it.
    tensors = {"latent_tensor": latent.contiguous(), "latent_format_version_0": torch.tensor([])}
    _write(Path(path), safetensors.save(tensors))


def noise(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Unit noise, float32, the same on every machine: as ComfyUI draws it, on the CPU."""
    torch = _needed("torch")
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)


def write_png(
    path: str | os.PathLike[str], image: torch.Tensor, notes: Mapping[str, str] | None = None
) -> list[Path]:
    """Writes image [B, H, W, 3] in 0..1 as PNG; a batch as name.png, name-2.png and so on.

    Args:
        notes: text chunks of the file: seed, sampler and so on.

    Returns:
        The files.
    """
    import io

    pillow = _needed("PIL.Image")
    png = _needed("PIL.PngImagePlugin")
    info = png.PngInfo()
    for name, text in (notes or {}).items():
        info.add_text(name, text)
    path = Path(path)
    paths = []
    for index, one in enumerate(image):
        height, width, _ = one.shape
        pixels = (one.float().clamp(0, 1) * 255).round().to(_needed("torch").uint8).contiguous()
        content = io.BytesIO()
        picture = pillow.frombytes("RGB", (width, height), pixels.numpy().tobytes())
        picture.save(content, "PNG", pnginfo=info)
        paths.append(path if not index else path.with_stem(f"{path.stem}-{index + 1}"))
        _write(paths[-1], content.getvalue())
    return paths


def _write(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except OSError as error:
        raise XditError(Code.BAD_VALUE, f"{path} cannot be written: {error.strerror or error}.") from error
    finally:
        beside.unlink(missing_ok=True)


def _needed(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"PIL": "pillow"}.get(module.partition(".")[0], module.partition(".")[0])
        raise XditError(
            Code.NOT_BUILT,
            f"Tensors and pictures need {package}, which this Python has not: pip install 'xditd[daemon]', or {package} alone.",
        ) from error
