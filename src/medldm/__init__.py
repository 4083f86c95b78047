"""Latent-diffusion synthesis of medical images, in 2D and 3D."""

__version__ = "0.1.0"
