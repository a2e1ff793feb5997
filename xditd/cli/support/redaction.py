"""What may leave the machine: configuration by keys that are known to be harmless, text without what looks secret. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

REDACTED = "<redacted>"

PUBLIC = frozenset(
    {
        "endpoint", "runtime_dir", "allow_insecure_tcp", "nursery",
        "devices.kind", "devices.use", "devices.cpu_ranks", "devices.threads", "devices.reserve_memory",
        "devices.activation_memory", "devices.cpu_memory", "devices.weights",
        "models.comfyui", "models.extra_model_paths", "models.folders", "models.follow_symlinks", "models.preload",
        "models.keep_alive", "models.keep_alive_of", "models.sleep_after", "models.sleep_after_of", "models.patience",
        "arena.first_bytes", "arena.per_client_bytes", "arena.total_bytes",
        "limits.runs_per_client", "limits.queue", "limits.clients", "limits.runs_per_group",
        "deadlines.load", "deadlines.first_turn", "deadlines.turn", "deadlines.run_idle", "deadlines.stop",
        "deadlines.drain", "deadlines.queued",
        "restart.limit", "restart.window", "restart.backoff",
        "compute.attention", "compute.compile", "compute.dtype", "compute.fallback",
        "log.level", "log.format",
        "metrics.port", "metrics.address",
        "debug.echo", "debug.nursery",
    }
)  # fmt: skip
"""Keys of the configuration whose values are shown, but for what looks secret in them."""

SECRET = frozenset({"debug.rank_options", "debug.rank_command"})
"""Keys that may carry anything: a program of somebody's own, and what it is given. A key in neither list is secret too."""

_PATTERNS = (
    # name=value and name: value, quoted or not
    (
        re.compile(
            r"""(?i)\b([\w-]*(?:token|secret|passw(?:or)?d|passphrase|api[_-]?key|private[_-]?key|credential|cookie))"""
            r"""(["']?\s*[=:]\s*)("[^"]*"|'[^']*'|[^\s,;]+)"""
        ),
        rf"\1\2{REDACTED}",
    ),
    (
        re.compile(r"(?i)\b(authorization|bearer)(\s*:?\s+)(?:(?:bearer|basic)\s+)?[^\s,;]+"),
        rf"\1\2{REDACTED}",
    ),
    (
        re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|AKIA)[A-Za-z0-9_-]{12,}"),
        REDACTED,
    ),  # keys that tell what they are
    (re.compile(r"(\w+://)[^/\s:@]+(?::[^/\s@]*)?@"), rf"\1{REDACTED}@"),
    (
        re.compile(
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
        ),
        REDACTED,
    ),
)


def text(written: str, home: str = "") -> str:
    """Without what looks secret, and with the home folder as "~": its name is a person's."""
    for pattern, instead in _PATTERNS:
        written = pattern.sub(instead, written)
    if len(home) > 1:
        written = re.sub(rf"{re.escape(home)}(?=/|\b)", "~", written)
    return written


def configuration(plain: Mapping[str, Any], home: str = "", prefix: str = "") -> dict[str, Any]:
    """The configuration with every value redacted whose key is not known to be harmless."""
    shown: dict[str, Any] = {}
    for key, value in plain.items():
        dotted = prefix + key
        if dotted in PUBLIC:
            shown[key] = _strings(value, home)
        elif isinstance(value, Mapping) and dotted not in SECRET:
            shown[key] = configuration(value, home, dotted + ".")
        else:
            shown[key] = REDACTED
    return shown


def report(plain: dict[str, Any]) -> dict[str, Any]:
    """A status report without the labels of runs: they are a client's words, and may be its prompt."""
    runs = [
        run | {"label": f"<{len(run['label'])} characters>"} if run.get("label") else run
        for run in plain.get("runs", ())
    ]
    return plain | {"runs": runs}


def _strings(value: Any, home: str) -> Any:
    if isinstance(value, str):
        return text(value, home)
    if isinstance(value, Mapping):
        return {text(key, home): _strings(inner, home) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strings(inner, home) for inner in value]
    return value
