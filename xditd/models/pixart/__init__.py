"""PixArt-α and PixArt-Σ, of any width and depth."""
