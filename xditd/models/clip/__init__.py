"""CLIP's text encoders: L and G."""
