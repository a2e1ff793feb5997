"""Stable Diffusion 3 and 3.5, medium and large, of any width and depth."""
