"""XDiT Daemon Status: what `xditctl status` shows, as text in a workflow."""

from __future__ import annotations

import math
from typing import Any

from comfy_api.latest import io, ui

from xditd.protocol.figures import DeviceStatus, GroupStatus
from xditd.protocol.messages import StatusReport
from xditd.protocol.plans import spell_weights

from . import daemon
from .loaders import ENDPOINT


class DaemonStatus(io.ComfyNode):
    """What the daemon says of itself."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="XDiTDaemonStatus",
            display_name="XDiT Daemon Status",
            category="xDiT",
            description="Shows the daemon's devices, models and runs, as `xditctl status` does.",
            inputs=[io.String.Input("endpoint", default="", optional=True, tooltip=ENDPOINT)],
            outputs=[io.String.Output(display_name="status")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> float:
        return math.nan  # unlike itself: never taken from the cache

    @classmethod
    def execute(cls, endpoint: str = "") -> io.NodeOutput:
        text = describe(daemon.client(endpoint.strip()).status())
        return io.NodeOutput(text, ui=ui.PreviewText(text))


def describe(report: StatusReport) -> str:
    """A report in lines."""
    lines = [f"✅ xditd {report.version}, {report.state}, up {_time(report.uptime)}"]
    lines += [_device(device) for device in report.devices]
    lines += [_group(group) for group in report.groups] or ["no models loaded"]
    waiting = sum(run.state == "queued" for run in report.runs)
    lines.append(f"{len(report.runs)} runs, {waiting} waiting")
    return "\n".join(lines)


def _device(device: DeviceStatus) -> str:
    facts = [device.model] if device.model else []
    if device.memory_used is not None and device.memory_total is not None:
        facts.append(f"{device.memory_used / 2**30:.1f} of {device.memory_total / 2**30:.1f} GiB")
    if device.temperature is not None:
        facts.append(f"{device.temperature} °C")
    if device.power is not None:
        facts.append(f"{device.power:.0f} W")
    return f"{device.name}: {', '.join([*facts, 'busy' if device.busy else 'idle'])}"


def _group(group: GroupStatus) -> str:
    mark = {"ready": "✅", "failed": "❌"}.get(group.state, "⏳")
    kept = f", weights in {spell_weights(group.plan)}" if group.plan.weight_dtype else ""
    how = f"{group.model.name} on {', '.join(group.plan.devices)} in {group.dtype}{kept}"
    return f"{mark} {group.group}: {group.state}, {how}{', ' + group.problem if group.problem else ''}"


def _time(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
