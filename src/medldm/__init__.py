"""Latent-diffusion synthesis of medical images, in 2D and 3D.

`medldm.load(checkpoint)` gives a trained model that samples, reconstructs and translates
(`medldm.interface.Model`). Importing medldm itself loads neither torch nor anything else.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medldm.interface import Model, load

__version__ = "0.1.0"
__all__ = ["Model", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in ("Model", "load"):
        from medldm import interface

        return getattr(interface, name)
    raise AttributeError(f"module 'medldm' has no attribute '{name}'")
