"""The SDXL base UNet, of any width and depth."""
