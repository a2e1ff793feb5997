"""The daemon process: `python -m xditd.daemon --config FILE`, as `xditd serve` and systemd start it.

Exit codes: 0 stopped as asked; 78 bad configuration, which systemd does not try again; 69 another daemon holds the
endpoint; 1 anything else.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import getpass
import logging
import resource
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import zmq

from xditd.catalog.catalog import Catalog
from xditd.catalog.roots import model_roots
from xditd.daemon.config import Config, load_config
from xditd.daemon.home import Home, endpoint_of
from xditd.daemon.log import start_logging
from xditd.daemon.server import Server
from xditd.daemon.systemd import Notifier
from xditd.protocol.errors import Code, XditError

log = logging.getLogger("xditd.daemon")

EXITS = {Code.BAD_CONFIG: 78, Code.ALREADY_RUNNING: 69}  # as sysexits.h: EX_CONFIG, EX_UNAVAILABLE

TICK = 0.05
"""Seconds between two looks at the clock: how late a deadline may be noticed."""


def main() -> int:
    arguments = _arguments()
    overrides = dict(arguments.set)
    start_logging(format="json" if overrides.get("log.format") == "json" else "text")
    try:
        config = load_config(arguments.config, overrides)
        start_logging(config.log.level, config.log.format)
        return _run(_serve(config))
    except XditError as error:
        log.error("%s", error.message, extra={"code": error.code})
        return EXITS.get(Code(error.code), 1)


def _run(serving: Coroutine[Any, Any, int]) -> int:
    """On uvloop where it is installed: its rounds take a twentieth off a step's way through the daemon."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(serving)
    return int(uvloop.run(serving))


async def _serve(config: Config) -> int:
    notifier = Notifier.from_environment()
    endpoint = endpoint_of(config)
    catalog = make_catalog(config)
    _have_descriptors()
    stopping, forced = asyncio.Event(), asyncio.Event()

    def stop() -> None:
        (forced if stopping.is_set() else stopping).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    with Home(config, endpoint) as home:
        try:
            server = Server(config, endpoint, home.runtime, catalog, stop)
        except zmq.ZMQError as error:
            raise XditError(Code.BAD_CONFIG, f"{endpoint.address} cannot be listened on: {error}.") from error
        try:
            await server.start()
            _settle_memory()
            tasks = [loop.create_task(notifier.keep_watchdog()), loop.create_task(_tick(server))]
            devices = ", ".join(device.name for device in server.devices)
            log.info("Serving on %s, with %s.", endpoint.address, devices, extra={"done": True})
            tasks.append(loop.create_task(_tell_ready(server, notifier, f"Serving on {endpoint.address}")))
            await stopping.wait()
            notifier.stopping("Waiting for requests under way")
            await _stop(server, config, forced)
            for task in tasks:
                task.cancel()
        finally:
            await server.close()
            notifier.close()
    log.info("Stopped.", extra={"done": True})
    return 0


def make_catalog(config: Config) -> Catalog:
    """The catalog of the folders that the configuration names."""
    models = config.models
    roots = model_roots(
        folders=models.folders,
        comfyui=models.comfyui or None,
        extra_model_paths=(models.extra_model_paths,) if models.extra_model_paths else (),
        follow_symlinks=models.follow_symlinks,
        user=getpass.getuser(),
    )
    return Catalog(roots, echo=config.debug.echo)


async def _tell_ready(server: Server, notifier: Notifier, status: str) -> None:
    """Ready means ready: models to preload are there."""
    if not server.ready.is_set():
        notifier.status(f"{status}, loading models")
    await server.ready.wait()
    notifier.ready(status)


async def _tick(server: Server) -> None:
    while True:
        await asyncio.sleep(TICK)
        server.tick()


async def _stop(server: Server, config: Config, forced: asyncio.Event) -> None:
    """Takes nothing new, lets requests under way end, tells the ranks to leave. A second signal hurries."""
    log.info("Stopping. Requests under way have %g s; a second signal ends them.", config.deadlines.drain)
    server.drain()
    await _until(lambda: not server.busy, config.deadlines.drain, forced)
    server.end_runs()
    await _until(lambda: server.empty, config.deadlines.stop, forced)


async def _until(done: Callable[[], bool], seconds: float, hurry: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    while not done() and not hurry.is_set() and loop.time() < deadline:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(hurry.wait(), 0.01)


def _settle_memory() -> None:
    """What there is by now stays: the garbage collector needs not look at it again.

    Modules and tables are thirty thousand objects. A full collection that looks at them holds the event loop up for
    10 ms or more, in the middle of somebody's step; without them it is as short as what the clients have is little.
    """
    gc.collect()
    gc.freeze()


def _have_descriptors() -> None:
    """libzmq aborts the process when it has no descriptor left for an ipc client: take all that we may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else hard
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="xditd serve", description="Serve diffusion models to ComfyUI and programs."
    )
    parser.add_argument(
        "--config", metavar="FILE", help="TOML; systemd/xditd.toml.example documents every key"
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        type=_override,
        help="a key of it, which wins over the file: devices.cpu_ranks=2",
    )
    return parser.parse_args()


def _override(text: str) -> tuple[str, Any]:
    """A value as TOML would have it: a number, a truth value, a list; anything else is a string."""
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, msgspec.toml.decode(f"value = {value}")["value"]
    except msgspec.DecodeError:
        return key, value


if __name__ == "__main__":
    sys.exit(main())
