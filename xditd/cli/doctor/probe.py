"""What only a process with torch can tell, as JSON on standard output: `python -m xditd.cli.doctor.probe compute`.

A process of its own, since importing torch and touching CUDA take seconds and can crash. `world` starts two ranks
that add a number over gloo; `rank` is one of them.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import tempfile
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any


def compute() -> dict[str, Any]:
    """torch, its devices, NCCL, xfuser and flash-attn; an import that fails is told as "error"."""
    found: dict[str, Any] = {"torch": _version("torch"), "flash_attn": _version("flash_attn")}
    if "error" in found["torch"]:
        return found
    torch = importlib.import_module("torch")
    # Without a GPU xfuser refuses to be imported; the ranks import it through their seam.
    found["xfuser"] = _version("xfuser") if torch.cuda.is_available() else _installed("xfuser")
    found["cuda_build"] = torch.version.cuda or ""
    found["gloo"] = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    found["devices"] = []
    if torch.cuda.is_available():
        found["nccl"] = (
            ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else ""
        )
        count = torch.cuda.device_count()
        for index in range(count):
            properties = torch.cuda.get_device_properties(index)
            value = torch.ones(8, device=f"cuda:{index}").sum().item()
            found["devices"].append(
                {
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory": properties.total_memory,
                    "works": value == 8.0,
                    "peers": [
                        i for i in range(count) if i != index and torch.cuda.can_device_access_peer(index, i)
                    ],
                }
            )
    return found


def world() -> dict[str, Any]:
    """Two processes, one all_reduce over gloo."""
    with tempfile.TemporaryDirectory(prefix="xditd-doctor-") as folder:
        command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "rank"]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), str(Path(folder) / "store")],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]
        try:
            said = [rank.communicate(timeout=90) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    sums = [out.strip() for out, _ in said]
    if sums == ["3.0", "3.0"]:
        return {}
    return {
        "error": " ".join((said[0][1] or said[1][1]).strip().splitlines()[-1:]) or f"the ranks got {sums}"
    }


def rank(number: int, store: str) -> None:
    torch = importlib.import_module("torch")
    distributed = importlib.import_module("torch.distributed")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=number, world_size=2, timeout=timedelta(seconds=60)
    )
    value = torch.tensor([number + 1.0])
    distributed.all_reduce(value)
    distributed.destroy_process_group()
    print(value.item())


def _version(module: str) -> dict[str, str]:
    """The version of what is imported; where a module does not tell its own, as xfuser, of what is installed."""
    try:
        told = getattr(importlib.import_module(module), "__version__", None)
    # A broken build may raise anything at import; the check tells it to the person.
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    return {"version": told} if isinstance(told, str) else _installed(module)


def _installed(package: str) -> dict[str, str]:
    try:
        return {"version": metadata.version(package)}
    except metadata.PackageNotFoundError:
        return {"error": "not installed"}


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        rank(int(sys.argv[2]), sys.argv[3])
    else:
        print(json.dumps({"compute": compute, "world": world}[sys.argv[1]]()))
