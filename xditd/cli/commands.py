"""What all commands share: the endpoint option, the connection, the consoles, and errors as one line with a status."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click
import msgspec
from rich.console import Console

from xditd.cli import exits, words
from xditd.client import Client
from xditd.protocol.endpoints import VARIABLE
from xditd.protocol.errors import Code, XditError
from xditd.protocol.messages import ModelRef

PATIENCE = 5.0
"""Seconds to wait for a daemon, and for answers that need no model."""

F = TypeVar("F", bound=Callable[..., Any])


class Commands(click.Group):
    """A group whose commands may raise XditError: one line on standard error, and a status for scripts."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except XditError as error:
            show_error(error)
            ctx.exit(exits.status_of(error))
        except (KeyboardInterrupt, click.Abort):
            stderr().print("Interrupted.", style="dim")
            ctx.exit(exits.INTERRUPTED)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order of xditctl.py, not of the alphabet


def endpoint_option(command: F) -> F:
    return click.option(
        "--endpoint",
        metavar="ENDPOINT",
        help=f"Where the daemon is: ipc:///path or tcp://host:port. Default: {VARIABLE}, else the user's socket, "
        "else the system's.",
    )(command)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def connect(endpoint: str | None, **options: Any) -> Client:
    """A client under xditctl's name. A person waits no half minute to hear that there is no daemon."""
    return Client(endpoint, name="xditctl", **({"timeout": PATIENCE} | options))


def stdout() -> Console:
    return _console(stderr=False)


def stderr() -> Console:
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    """Colours and the terminal's width on a terminal; plain and wide in a pipe, where nothing should be cut."""
    stream = sys.stderr if stderr else sys.stdout
    wide = None if stream.isatty() or "COLUMNS" in os.environ else 200
    return Console(stderr=stderr, width=wide, highlight=False, emoji=False)


def show_error(error: XditError) -> None:
    """`❌ message [code]`, on one line however long it is."""
    code = error.code.value if isinstance(error.code, Code) else error.code
    console = stderr()
    console.print(f"{words.FAILED} ", end="")
    console.print(" ".join(error.message.split()), style="red", end=" ", markup=False, soft_wrap=True)
    console.print(f"[{code}]", style="dim", markup=False, soft_wrap=True)


def print_json(answer: Any) -> None:
    """A struct of the protocol, or plain values, as indented JSON; without what belongs to the exchange alone."""
    plain = msgspec.to_builtins(answer)
    if isinstance(plain, dict):
        plain = {key: value for key, value in plain.items() if key not in ("re", "type")}
    click.echo(msgspec.json.format(msgspec.json.encode(plain), indent=2).decode())


class ModelName(click.ParamType):
    """A model as "kind/name", as `xditctl models` lists it."""

    name = "MODEL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> ModelRef:
        if isinstance(value, ModelRef):
            return value
        kind, slash, name = value.partition("/")
        if not (kind and slash and name):
            self.fail(
                f'{value!r} is not "kind/name", as in diffusion_models/flux1-dev.safetensors.', param, ctx
            )
        return ModelRef(kind=kind, name=name)


MODEL = ModelName()
