"""The samplers whose whole loop the ranks can run, by ComfyUI's names. `rank.sampling` has them."""

from __future__ import annotations

SAMPLERS = ("euler", "heun", "dpmpp_2m", "ddim")

PIPELINED = ("euler", "dpmpp_2m", "ddim")
"""Those that call the model once a step, as a pipeline of stages needs it."""
