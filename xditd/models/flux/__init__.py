"""Flux.1, dev and schnell, of any width and depth."""
