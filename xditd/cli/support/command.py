"""The command: makes each part, packs them, and says what is in the file."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
import time
from datetime import datetime
from pathlib import Path

import click
import msgspec
from msgspec import Struct
from rich.text import Text

from xditd.cli import words
from xditd.cli.commands import endpoint_option, json_option, print_json, stderr, stdout
from xditd.cli.shapes import columns
from xditd.cli.support import redaction
from xditd.cli.support.parts import Part, Wish, parts, unreached
from xditd.protocol.errors import Code, XditError


class Packed(Struct, frozen=True, kw_only=True):
    """One file of the bundle as it came out."""

    name: str
    what: str
    bytes: int
    problem: str = ""  # why it holds only this


@click.command("support-bundle")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The .tar.gz to write. Default: xditd-support-DATE.tar.gz here.",
)
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The configuration. Default: that of the daemon that runs, else where the units have it.",
)
@click.option("--lines", type=click.IntRange(0, 100_000), default=2000, show_default=True, help="Of the log.")
@click.option("--quick", is_flag=True, help="Without torch and GPUs: a second instead of ten.")
@json_option
@endpoint_option
def support_bundle(
    endpoint: str | None, output: Path | None, config: Path | None, lines: int, quick: bool, as_json: bool
) -> None:
    """Pack what somebody who is to help must see.

    Doctor's report, status, events, configuration, versions, the last lines of the log, nvidia-smi. Values of
    configuration keys that are not known to be harmless, labels of runs, and what looks like a token or password are
    left out; prompts and tensors are nowhere in it. It works without a daemon too. Look into it before you send it.

    \b
    Examples:
      xditctl support-bundle
      xditctl support-bundle --quick -o /tmp/bundle.tar.gz
    """
    path = output or Path(f"xditd-support-{datetime.now():%Y%m%d-%H%M%S}.tar.gz")
    if not os.access(path.absolute().parent, os.W_OK):
        raise _unwritable(path, "there is no such folder, or it is not yours to write to")
    wish = Wish(endpoint, config, lines, quick, unreached(endpoint))
    made: list[tuple[Packed, bytes]] = []
    for part in parts(wish):
        with stderr().status(f"[dim]{part.what}"):
            made.append(packed(part))
    write(path, made)
    contents = [one for one, _ in made]
    if as_json:
        print_json({"path": str(path.absolute()), "contents": contents})
        return
    table = columns("file", "size", "what it is", right=("size",))
    for one in contents:
        what = Text(one.what)
        if one.problem:
            what.append(f"\n{words.WARNING} {one.problem}", style="yellow")
        table.add_row(one.name, words.size(one.bytes), what)
    console = stdout()
    console.print(table)
    console.print(
        f"{words.OK} {path.absolute()}: look into it before you send it.", markup=False, soft_wrap=True
    )


def packed(part: Part) -> tuple[Packed, bytes]:
    """A part with its secrets out; one that cannot be had says why, and spoils nothing else."""
    problem = ""
    try:
        text = part.make()
    except (XditError, OSError, ValueError, msgspec.MsgspecError, subprocess.SubprocessError) as error:
        said = error.message if isinstance(error, XditError) else str(error)
        problem = redaction.text(f"could not be had: {said}", str(Path.home()))
        text = f"{problem}\n"
    content = redaction.text(text, str(Path.home())).encode()
    return Packed(name=part.name, what=part.what, bytes=len(content), problem=problem), content


def write(path: Path, made: list[tuple[Packed, bytes]]) -> None:
    """For its owner alone, and whole or not at all.

    Raises:
        XditError: `bad_value` where it cannot be written.
    """
    folder = path.name.removesuffix(".gz").removesuffix(".tar")
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as tar:
            for one, content in made:
                entry = tarfile.TarInfo(f"{folder}/{one.name}")
                entry.size, entry.mtime, entry.mode = len(content), int(time.time()), 0o600
                tar.addfile(entry, io.BytesIO(content))
        half.replace(path)
    except OSError as error:
        half.unlink(missing_ok=True)
        raise _unwritable(path, error.strerror or str(error)) from error


def _unwritable(path: Path, why: str) -> XditError:
    return XditError(Code.BAD_VALUE, f"{path} cannot be written: {why}; name another with --output.")
