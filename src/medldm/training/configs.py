"""Reads the config in a run folder, which may come from anyone."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from medldm.errors import InputError

LARGEST_CONFIG = 2**22  # characters


def read_config(text: str, path: Path) -> dict[str, Any]:
    """The config of a run from its text. InputError where it is no config, or expands by references to
    itself.
    """
    try:
        if len(text) > LARGEST_CONFIG or any(isinstance(t, yaml.AliasToken) for t in yaml.scan(text)):
            raise InputError(
                f"{path}: larger than any config, or holds YAML aliases; delete it or move it elsewhere"
            )
        config = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if text else {}
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())[:120]
        raise InputError(
            f"{path}: not the config of a run ({reason}); delete it or move it elsewhere"
        ) from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: not the config of a run; delete it or move it elsewhere")
    return config
