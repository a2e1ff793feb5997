"""`xditd serve`: turns a command line into the daemon's and becomes the daemon. Imports neither torch nor the daemon."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from xditd import __version__

KINDS = ("checkpoints", "diffusion_models", "unet", "vae", "text_encoders", "clip", "loras")
"""ComfyUI's folders of models, below its models/."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="xditd")
def main() -> None:
    """The daemon that keeps diffusion models warm across GPUs. `xditctl` looks at it and steers it."""


@main.command()
@click.option(
    "--config", type=click.Path(path_type=Path), help="TOML; every key is in systemd/xditd.toml.example."
)
@click.option(
    "--endpoint",
    help="Where to listen: ipc:///path. Default: the user's socket, or the system's as its service.",
)
@click.option(
    "--models",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A ComfyUI folder, or a models folder like its own.",
)
@click.option("--cpu-ranks", type=click.IntRange(1, 64), help="Use the CPU, as so many devices.")
@click.option("--log-format", type=click.Choice(["text", "json"]), help="Default: text.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), help="Default: info.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any key of the configuration: --set deadlines.turn=60.",
)
def serve(
    config: Path | None,
    endpoint: str | None,
    models: Path | None,
    cpu_ranks: int | None,
    log_format: str | None,
    log_level: str | None,
    settings: Sequence[str],
) -> None:
    """Serve until stopped with Ctrl-C or SIGTERM. Options win over the configuration file.

    \b
    Exit status: 0 stopped as asked, 69 another daemon holds the endpoint, 78 wrong configuration.

    \b
    Examples:
      xditd serve --models ~/ComfyUI
      xditd serve --config /etc/xditd/xditd.toml --log-format json
      xditd serve --models ./models --cpu-ranks 2 --endpoint ipc:///tmp/xditd.sock
    """
    chosen: dict[str, Any] = {"endpoint": endpoint, "log.format": log_format, "log.level": log_level}
    if cpu_ranks is not None:
        chosen |= {"devices.kind": "cpu", "devices.cpu_ranks": cpu_ranks}
    if models is not None:
        chosen |= model_settings(models)
    arguments = [] if config is None else ["--config", str(config)]
    for key, value in chosen.items():
        if value is not None:
            arguments += ["--set", f"{key}={json.dumps(value, ensure_ascii=False)}"]
    for setting in settings:
        arguments += ["--set", setting]
    become(arguments)


def model_settings(folder: Path) -> dict[str, Any]:
    """The configuration that finds the models in a folder: ComfyUI's own, or one with ComfyUI's kinds below it."""
    folder = folder.absolute()
    if (folder / "models").is_dir():
        return {"models.comfyui": str(folder)}
    kinds = [kind for kind in KINDS if (folder / kind).is_dir()]
    if not kinds:
        raise click.BadParameter(
            f"{folder} has neither models/ nor any of {', '.join(KINDS)} below it.", param_hint="--models"
        )
    return {f"models.folders.{kind}": [str(folder / kind)] for kind in kinds}


def become(arguments: Sequence[str]) -> None:
    """Replaces this process by the daemon: same pid, so that systemd and a terminal speak to it alone."""
    os.execv(sys.executable, [sys.executable, "-m", "xditd.daemon", *arguments])


if __name__ == "__main__":
    main()
