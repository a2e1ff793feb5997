"""AutoencoderKL: the VAE of Flux, SD3, SDXL and their kin."""
