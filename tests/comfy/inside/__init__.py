"""What runs in ComfyUI's own environment: tests, and a rank, that import ComfyUI. GPL-3.0-or-later, as ComfyUI is.

`COMFYUI_PATH=CHECKOUT PYTHONPATH=REPOSITORY PYTHON-OF-COMFYUI -m pytest tests/comfy/inside`; `tests/comfy` does so.
"""
