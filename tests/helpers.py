"""Composing configs as the commands do, and small numbers."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from medldm.attributes import KnownAttributes, known_attributes

CONFIG_DIR = Path(__file__).resolve().parents[1] / "configs"


def compose_config(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose(name, overrides=list(overrides))


def compose_part(path: str):
    """Instantiate one member of a group under configs/model."""
    with initialize_config_dir(str(CONFIG_DIR / "model"), version_base="1.3"):
        cfg = compose(path)
    for key in path.split("/")[:-1]:
        cfg = cfg[key]
    return instantiate(OmegaConf.to_container(cfg, resolve=True))


def stated(**facts) -> KnownAttributes:
    """What a model is told of data with these facts (num_views=2...), all of which state everything."""
    return known_attributes({"unknown_attributes": (), **facts})


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
