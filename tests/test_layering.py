"""Who may import whom, read from the source. ARCHITECTURE.md says why; here it is enforced.

`protocol ← handoff ← client ← cli, comfy_nodes`; `protocol, handoff, catalog ← daemon`; `protocol, handoff, catalog ←
models ← rank`. Nothing imports rank or daemon: they are started. An import inside a function counts like any other;
one under TYPE_CHECKING does not run, and may only reach for torch.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "xditd"

MAY_IMPORT: dict[str, set[str]] = {
    "": set(),  # xditd/__init__.py
    "protocol": set(),
    "handoff": {"protocol"},
    "client": {"protocol", "handoff"},
    "demo": {"protocol", "handoff", "client"},
    "cli": {"protocol", "handoff", "client", "demo"},
    "catalog": {"protocol"},
    "daemon": {"protocol", "handoff", "catalog"},
    "models": {"protocol", "handoff", "catalog"},
    "rank": {"protocol", "handoff", "catalog", "models"},
    "comfy_nodes": {"protocol", "handoff", "client"},
}
"""By part: the other parts of xditd that it may import."""

THIRD_PARTY: dict[str, set[str]] = {
    "": set(),
    "protocol": {"msgpack", "msgspec"},
    "handoff": {"msgspec"},
    "client": {"msgspec", "zmq"},
    "cli": {"click", "msgspec", "psutil", "rich"},
    "demo": set(),
    "catalog": {"msgspec"},
    "daemon": {"msgspec", "psutil", "zmq"},
    "models": {"diffusers", "msgspec", "safetensors", "torch", "transformers"},
    "rank": {"diffusers", "msgspec", "torch", "xfuser", "yunchang", "zmq"},
}
"""By part: what it may import from outside of the standard library, anywhere in it."""

LAZILY: dict[str, set[str]] = {
    "catalog/extra_paths.py": {"yaml"},
    "cli/doctor/compute.py": {"pynvml"},
    "cli/doctor/probe.py": {"torch"},  # a process of its own
    "daemon/__main__.py": {"uvloop"},
    "models/reading.py": {"gguf"},  # numpy with it
    "daemon/devices.py": {"pynvml"},
    "daemon/gauges.py": {"pynvml"},
    "daemon/live_figures.py": {"prometheus_client"},
    "daemon/metrics.py": {"prometheus_client"},
    "daemon/scrape.py": {"prometheus_client"},
}
"""By file: what it may import besides, inside a function, since it is not there in every installation."""

WHOLLY: dict[str, set[str]] = {"client/tensors.py": {"torch"}}
"""By file: what it may import besides at its top, since whoever imports the file does so inside a function."""

LIGHT = ("protocol", "handoff", "client", "cli", "demo", "catalog", "daemon")
HEAVY = {
    "torch",
    "numpy",
    "diffusers",
    "transformers",
    "xfuser",
    "safetensors",
    "triton",
    "yunchang",
    "accelerate",
    "PIL",
}

PURE = (
    "catalog/detection.py",
    "catalog/families/*.py",
    "catalog/layouts/*.py",
    "daemon/chronicle.py",
    "daemon/deadlines.py",
    "daemon/departures.py",
    "daemon/descent.py",
    "daemon/dispatcher.py",
    "daemon/ends.py",
    "daemon/experience.py",
    "daemon/fleet.py",
    "daemon/groups.py",
    "daemon/jobs.py",
    "daemon/line.py",
    "daemon/loads.py",
    "daemon/placing.py",
    "daemon/planner.py",
    "daemon/ports.py",
    "daemon/residency.py",
    "daemon/roster.py",
    "daemon/runs.py",
    "daemon/scheduling.py",
    "daemon/states.py",
    "daemon/tidings.py",
    "daemon/turns.py",
    "daemon/work.py",
    "handoff/records.py",
    "handoff/slots.py",
    "models/*/config.py",
    "protocol/figures.py",
    "protocol/messages.py",
    "protocol/noise.py",
    "protocol/orders.py",
    "protocol/plans.py",
    "protocol/watching.py",
    "protocol/tensors.py",
)
"""Files that decide and do not act: their tests need no socket, clock, process or device."""

ACTING = {
    "asyncio", "fcntl", "io", "mmap", "multiprocessing", "os", "pathlib", "psutil", "pynvml", "select", "selectors",
    "shutil", "signal", "socket", "subprocess", "tempfile", "threading", "time", "torch", "zmq",
}  # fmt: skip

MAX_LINES = 400


@dataclass(frozen=True, slots=True)
class Import:
    """One import: of which module, on which line; `lazy` inside a function, `typing` under TYPE_CHECKING."""

    module: str
    line: int
    lazy: bool
    typing: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def imports(source: str) -> Iterator[Import]:
    """Every import of a file, and every `import_module` of a name that is written out."""

    def walk(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, lazy, typing) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                if child.level:
                    yield Import(".", child.lineno, lazy, typing)
                elif child.module == "xditd":
                    yield from (Import(f"xditd.{a.name}", child.lineno, lazy, typing) for a in child.names)
                else:
                    yield Import(child.module or "", child.lineno, lazy, typing)
            elif isinstance(child, ast.Call) and _is_import_call(child):
                argument = child.args[0]
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield Import(argument.value, child.lineno, True, typing)
            inside = lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            guarded = typing or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
            yield from walk(child, inside, guarded)

    yield from walk(ast.parse(source), False, False)


def _is_import_call(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    return name in ("import_module", "__import__") and bool(call.args)


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    inside = path.relative_to(PACKAGE).parts
    return inside[0] if len(inside) > 1 else ""


def faults(path: Path, part: str) -> Iterator[str]:
    """What a file imports and may not."""
    name = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else ""
    for found in imports(path.read_text(encoding="utf-8")):
        where = f"{path.relative_to(ROOT)}:{found.line} imports {found.module}"
        if found.module == ".":
            yield f"{where}: write imports out, from xditd"
        elif found.top == "xditd":
            other = found.module.split(".")[1] if "." in found.module else ""
            if other in MAY_IMPORT and other not in MAY_IMPORT[part] | {part, ""}:
                yield f"{where}: {part or 'xditd'} may import {', '.join(sorted(MAY_IMPORT[part])) or 'no part'}"
        elif found.top not in sys.stdlib_module_names:
            allowed = (
                THIRD_PARTY[part]
                | WHOLLY.get(name, set())
                | (LAZILY.get(name, set()) if found.lazy else set())
            )
            if found.top not in allowed and not (found.typing and found.top == "torch"):
                yield f"{where}: {part or 'xditd'} may import {', '.join(sorted(allowed)) or 'the standard library'}"


@pytest.mark.parametrize(
    "part", [part for part in MAY_IMPORT if part != "comfy_nodes"], ids=lambda part: part or "xditd"
)
def test_a_part_imports_only_what_it_may(part):
    found = [fault for path in files() if part_of(path) == part for fault in faults(path, part)]
    assert not found, "\n".join(found)


def test_every_part_is_in_the_table():
    assert {part_of(path) for path in files()} <= set(MAY_IMPORT)


def test_the_node_pack_reaches_for_the_client_alone():
    pack = ROOT / "comfy_nodes"
    for path in sorted(pack.rglob("*.py")):
        for found in imports(path.read_text(encoding="utf-8")):
            if found.top == "xditd" and "." in found.module:
                other = found.module.split(".")[1]
                assert other not in MAY_IMPORT or other in MAY_IMPORT["comfy_nodes"], (
                    f"{path.name}: {found.module}"
                )


def test_what_is_apache_never_imports_comfyui():
    """ComfyUI is GPL-3: only comfy_nodes may, and the programs that its tests run within ComfyUI, which are as well."""
    for folder in (PACKAGE, ROOT / "bench", ROOT / "tests"):
        for path in sorted(folder.rglob("*.py")):
            if path.is_relative_to(ROOT / "tests" / "comfy" / "inside"):
                continue
            for found in imports(path.read_text(encoding="utf-8")):
                assert not found.top.startswith("comfy") or found.module == "comfy_nodes.dispatcher", (
                    f"{path.relative_to(ROOT)}:{found.line} imports {found.module}"
                )


@pytest.mark.parametrize("pattern", PURE)
def test_what_decides_does_not_act(pattern):
    paths = sorted(PACKAGE.glob(pattern))
    assert paths, f"nothing is called {pattern}; mend the list"
    for path in paths:
        for found in imports(path.read_text(encoding="utf-8")):
            assert found.top not in ACTING, f"{path.relative_to(ROOT)}:{found.line} imports {found.module}"


def test_files_are_small_enough_to_read():
    lines = {path.relative_to(ROOT).as_posix(): _lines(path) for path in files()}
    long = {name: count for name, count in lines.items() if count > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines: {long}"


def _lines(path: Path) -> int:
    """Those with something on them."""
    return sum(bool(line.strip()) for line in path.read_text(encoding="utf-8").splitlines())


def test_every_file_says_what_it_is():
    for path in files():
        source = path.read_text(encoding="utf-8")
        if source.strip():
            assert ast.get_docstring(ast.parse(source)), f"{path.relative_to(ROOT)} has no docstring"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("part", LIGHT)
def test_what_is_light_loads_nothing_heavy(part):
    """In an interpreter of its own: every module of the part, and what really is loaded with it, by whomever."""
    ours = [path for path in files() if part_of(path) == part and path.name != "__main__.py"]
    modules = [module_of(path) for path in ours if path.relative_to(PACKAGE).as_posix() not in WHOLLY]
    script = f"import json, sys, {', '.join(modules)}; print(json.dumps([*sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = json.loads(done.stdout)
    assert set(modules) <= set(loaded)
    assert HEAVY.isdisjoint(name.partition(".")[0] for name in loaded)
    others = {name.split(".")[1] for name in loaded if name.startswith("xditd.")} & set(MAY_IMPORT)
    assert others <= MAY_IMPORT[part] | {part}


def test_the_client_alone_loads_little_and_no_torch():
    """What a ComfyUI pays for `import xditd.client`; `-X importtime` says where it went."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import xditd.client"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    loaded = [
        line.rpartition("|")[2].strip()
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    ]
    assert "xditd.client.client" in loaded
    assert HEAVY.isdisjoint(name.partition(".")[0] for name in loaded)


def test_the_tables_name_files_that_are_there():
    for name in (*LAZILY, *WHOLLY):
        assert (PACKAGE / name).is_file(), f"there is no {name}; mend the table"


# ------------------------------------------------------------------------------- and the test of this test


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("protocol", "import xditd.handoff.slots"),
        ("handoff", "from xditd.client import Client"),
        ("client", "from xditd import daemon"),
        ("cli", "def f():\n    from xditd.catalog import header"),
        ("catalog", "from xditd.models.families import x"),
        ("daemon", "import torch"),
        ("daemon", "import importlib\ndef f():\n    return importlib.import_module('xditd.rank.main')"),
        ("models", "import xditd.rank"),
        ("rank", "from xditd.daemon import server"),
        ("client", "import numpy"),
        ("protocol", "try:\n    import zmq\nexcept ImportError:\n    zmq = None"),
        ("catalog", "def f():\n    import yaml"),
        ("daemon", "from . import server"),
        ("cli", "if True:\n    import torch"),
    ],
)
def test_a_forbidden_import_is_seen(part, source, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "file.py"
    path.write_text(source)
    assert len(list(faults(path, part))) == 1


def test_an_allowed_import_is_not_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    path = tmp_path / "file.py"
    path.write_text(
        "import os, zmq\nfrom xditd import __version__\nfrom xditd.protocol import codec\nfrom typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import torch\n"
    )
    assert list(faults(path, "client")) == []
