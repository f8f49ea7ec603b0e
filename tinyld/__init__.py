"""tinyld: masked diffusion language models, and their adaptation along the denoising trajectory."""

__version__ = "0.1.0"
