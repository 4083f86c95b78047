"""What each experiment, command and member of a config group composes to, held by a digest.

A digest that changes changes every later run of that experiment, so it is renewed on purpose only:
`python -m tests.commands.test_composed` rewrites the file, and the commit says why.
"""

import hashlib
import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from tests.helpers import CONFIG_DIR

pytestmark = pytest.mark.filterwarnings("ignore:.*missing `_self_`")
DIGESTS = Path(__file__).with_name("composed.json")


def digest(name: str, *overrides: str) -> str:
    """The digest of a composed config as it stands: interpolations and missing values stay unresolved, so
    that neither the environment nor the machine enters.
    """
    config = OmegaConf.to_container(compose(name, overrides=list(overrides)), resolve=False)
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def names() -> list[str]:
    """Every file below configs, as Hydra names it."""
    files = sorted(CONFIG_DIR.rglob("*.yaml"))
    return [str(file.relative_to(CONFIG_DIR).with_suffix("")) for file in files]


def digests() -> dict[str, str]:
    """The digest of every config: of experiments as `medldm train` composes them, of all others by
    themselves.
    """
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return {
            name: digest("train", f"experiment={name.removeprefix('experiment/')}")
            if name.startswith("experiment/")
            else digest(name)
            for name in names()
        }


def test_every_config_composes_to_what_it_did():
    stored, now = json.loads(DIGESTS.read_text()), digests()
    assert not {name: (stored.get(name), now[name]) for name in now if stored.get(name) != now[name]}
    assert not stored.keys() - now.keys()


if __name__ == "__main__":
    DIGESTS.write_text(json.dumps(digests(), indent=1) + "\n")
