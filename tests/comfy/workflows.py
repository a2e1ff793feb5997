"""Workflows as ComfyUI saves them, and the form in which its API takes them."""

from __future__ import annotations

from typing import Any

NOTES = ("Note", "MarkdownNote")
"""Nodes that exist for the eye alone."""

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
"""Types of inputs that a person sets on the node; all others are sockets."""


def api_form(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """The API form of a workflow that was saved from the editor.

    Args:
        object_info: what ComfyUI answers at /object_info; its `input_order` is the order of widget values.

    Raises:
        ValueError: a node has more or fewer widget values than its schema has widgets.
    """
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    return {
        str(node["id"]): {
            "class_type": node["type"],
            "inputs": {**_widgets(node, object_info[node["type"]]), **_sockets(node, links)},
        }
        for node in workflow["nodes"]
        if node["type"] not in NOTES
    }


def widget_names(info: dict[str, Any]) -> list[str]:
    """What each widget value of a node belongs to, in order; "" is a control_after_generate, which the API has not."""
    names = []
    for kind in ("required", "optional"):
        for name in info.get("input_order", {}).get(kind, ()):
            type_, options = [*info["input"][kind][name], {}][:2]
            if isinstance(type_, list) or type_ in WIDGETS:
                names.append(name)
                if options.get("control_after_generate"):
                    names.append("")
    return names


def _widgets(node: dict[str, Any], info: dict[str, Any]) -> dict[str, Any]:
    names, values = widget_names(info), node.get("widgets_values", [])
    if len(names) != len(values):
        raise ValueError(f"{node['type']} {node['id']} has {len(values)} widget values; its schema: {names}.")
    return {name: value for name, value in zip(names, values, strict=True) if name}


def _sockets(node: dict[str, Any], links: dict[int, list[Any]]) -> dict[str, Any]:
    return {
        socket["name"]: links[socket["link"]]
        for socket in node.get("inputs", ())
        if socket.get("link") is not None
    }
