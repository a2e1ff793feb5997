"""Load LoRA (xDiT): adds a LoRA to a MODEL whose weights are in the daemon, which merges it there."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import folder_paths
from comfy_api.latest import io

from xditd.protocol.plans import LoraMatch, LoraRef

from . import daemon, freeing
from .loaders import CATEGORY, DispatcherType
from .patcher import check_same, with_loras
from .say import say, telling_refusals


class LoadLoRA(io.ComfyNode):
    """One more LoRA on a MODEL and its dispatcher."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="XDiTLoraLoader",
            display_name="Load LoRA (xDiT)",
            category=CATEGORY,
            description="Adds a LoRA to a diffusion model in the xDiT daemon. Several follow one another.",
            inputs=[
                io.Model.Input("model", tooltip="From an xDiT loader, or another Load LoRA (xDiT)."),
                DispatcherType.Input("dispatcher", tooltip="From where the MODEL comes from."),
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="A .safetensors file of ComfyUI's loras folders, which the daemon must see too.",
                ),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-100.0,
                    max=100.0,
                    step=0.01,
                    tooltip="How much of it; may be negative. Another strength loads nothing again.",
                ),
            ],
            outputs=[io.Model.Output(), DispatcherType.Output(display_name="XDIT_DISPATCHER")],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **inputs: Any) -> str:
        """A file that was replaced is another LoRA, under the same name too."""
        path = folder_paths.get_full_path("loras", lora_name)
        if path is None:  # gone: `execute` says so
            return ""
        there = os.stat(path)
        return f"{there.st_size} {there.st_mtime_ns} {there.st_ino}"

    @classmethod
    @telling_refusals()
    def execute(cls, model: Any, dispatcher: Any, lora_name: str, strength_model: float) -> io.NodeOutput:
        check_same(model, dispatcher)
        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        ref = LoraRef(
            name=lora_name.replace(os.sep, "/"), strength=strength_model, size=os.path.getsize(path)
        )
        wished = replace(dispatcher, lora=(*dispatcher.lora, ref))
        loaded = daemon.client(wished.endpoint).load(
            wished.model,
            wished.plan,
            lora=wished.lora,
            on_event=daemon.telling(wished.model.name),
            interrupt=daemon.interrupt,
        )
        freeing.used(wished)
        say(_verdict(loaded.lora[-1]))
        return io.NodeOutput(with_loras(model, wished.lora), wished)


def _verdict(match: LoraMatch) -> str:
    """What the LoRA changes, in one line for people."""
    lack = ""
    if match.matched < match.modules:
        lack = f"; the model has no {', '.join(match.unmatched[:2])}"
    text = f"; its {match.text} changes of text encoders are left out" if match.text else ""
    what = f"{match.name} × {match.strength:g} changes {match.matched} of {match.modules} modules"
    return f"{'⚠️' if lack or text else '✅'} {what}{lack}{text}"
