"""The pack as ComfyUI sees it: its nodes, and an offer to replace stock ones where ComfyUI has such offers."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyExtension, io

from . import freeing, loaders, loras, samplers, status
from .say import running_server

TWINS = {
    "CheckpointLoaderSimple": (loaders.LoadCheckpoint, ("ckpt_name",)),
    "UNETLoader": (loaders.LoadUNet, ("unet_name", "weight_dtype")),
    "VAELoader": (loaders.LoadVAE, ("vae_name",)),
    "CLIPLoader": (loaders.LoadCLIP, ("clip_name", "type")),
    "DualCLIPLoader": (loaders.LoadDualCLIP, ("clip_name1", "clip_name2", "type")),
    "TripleCLIPLoader": (loaders.LoadTripleCLIP, ("clip_name1", "clip_name2", "clip_name3")),
}
"""Stock nodes whose workflows stay whole when ours takes their place. A KSampler also needs a dispatcher's link."""


class Pack(ComfyExtension):
    """The nodes."""

    async def on_load(self) -> None:
        if not hasattr(io, "NodeReplace"):
            return
        from comfy_api.latest import ComfyAPI

        for old, (twin, widgets) in TWINS.items():
            replacement = io.NodeReplace(
                new_node_id=twin.define_schema().node_id,
                old_node_id=old,
                old_widget_ids=list(widgets),
                input_mapping=[{"new_id": name, "old_id": name} for name in widgets],
            )
            await ComfyAPI().node_replacement.register(replacement)

    async def get_node_list(self) -> list[type[Any]]:
        if (server := running_server()) is not None:
            freeing.listen(server)
        return [*loaders.NODES, loras.LoadLoRA, *samplers.NODES, status.DaemonStatus]
