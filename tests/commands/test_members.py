"""Members of config groups are used, inherit what they share, and every key of theirs reaches code."""

import ast
import itertools
import re
import shutil
from collections.abc import Iterator

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.conf import HydraConf
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError

from tests.helpers import CONFIG_DIR

pytestmark = pytest.mark.filterwarnings("ignore:.*missing `_self_`")
ROOT = CONFIG_DIR.parent
NAMES = sorted(str(path.relative_to(CONFIG_DIR).with_suffix("")) for path in CONFIG_DIR.rglob("*.yaml"))
COMMANDS = [name for name in NAMES if "/" not in name]
EXPERIMENTS = [name for name in NAMES if name.startswith("experiment/")]
MEMBERS = [name for name in NAMES if "/" in name and name not in EXPERIMENTS]


def read(name: str) -> dict:
    return yaml.safe_load((CONFIG_DIR / f"{name}.yaml").read_text()) or {}


def body(name: str) -> dict:
    return {key: value for key, value in read(name).items() if key != "defaults"}


def chosen(name: str) -> Iterator[str]:
    """The members that a file's defaults list names, as paths below configs."""
    folder = name.rpartition("/")[0]
    for entry in read(name).get("defaults", ()):
        ((group, choice),) = entry.items() if isinstance(entry, dict) else [("", entry)]
        if choice in (None, "_self_") or "hydra" in group:
            continue
        parts = [group.removeprefix("override ").partition("@")[0], choice.partition("@")[0]]
        path = "/".join(filter(None, parts))
        yield path[1:] if path.startswith("/") else f"{folder}/{path}".lstrip("/")


def named_in(*folders: str) -> set[str]:
    """Members that code, tests and scripts choose: model/network=unet3d, "network/unet3d", "adni" of data."""
    files = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".sh")
    ]
    text = "\n".join(path.read_text() for path in files)
    pairs = re.findall(r"([a-z_/]+)(?:@[\w.]+)?=([\w/]+)", text)
    quoted = re.findall(r"\"([\w/]+)\"", text)
    return {"/".join(pair) for pair in pairs} | {
        f"{top}/{word}" for top in ("model", "data") for word in quoted
    }


def made_by_tests() -> set[str]:
    """Members of the groups of which tests/diffusion/test_configs.py makes every one."""
    text = (ROOT / "tests/diffusion/test_configs.py").read_text()
    groups = re.findall(r"members\(\"(\w+)\"\)", text)
    return {name for name in MEMBERS if name.split("/")[1] in groups}


def test_every_member_is_used_by_an_experiment_a_command_or_a_test():
    used = {choice for name in NAMES for choice in chosen(name)}
    used |= named_in("src", "tests", "slurm", "scripts") | made_by_tests()
    assert not sorted(set(MEMBERS) - used)


# ---- what a file states is a difference -------------------------------------------------------------------


def leaves(part: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in part.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def at(config: dict, key: str) -> object:
    for name in key.split("."):
        config = config.get(name, ...) if isinstance(config, dict) else ...
    return config


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A copy of configs in which every file has a twin `<name>__bare` with its defaults list alone."""
    folder = tmp_path_factory.mktemp("bare") / "configs"
    shutil.copytree(CONFIG_DIR, folder)
    for name in NAMES:
        header = "# @package _global_\n" if name.startswith("experiment/") else ""
        text = yaml.safe_dump({"defaults": read(name).get("defaults", [])})
        (folder / f"{name}__bare.yaml").write_text(header + text)
    return folder


def without_body(name: str) -> dict:
    """What a file composes to where it states nothing itself."""
    if name.startswith("experiment/"):
        return OmegaConf.to_container(compose("train", [f"{name.replace('/', '=', 1)}__bare"]))
    config = OmegaConf.to_container(compose(f"{name}__bare"))
    for group in name.split("/")[:-1]:
        config = config[group]
    return config


def test_a_file_states_what_differs_from_what_it_inherits(bare):
    repeated = []
    with initialize_config_dir(str(bare), version_base="1.3"):
        for name in NAMES:
            if list(chosen(name)):
                base = without_body(name)
                repeated += [f"{name}: {key}" for key, value in leaves(body(name)) if at(base, key) == value]
    assert not repeated


def test_members_of_a_group_inherit_what_they_share():
    """Two files of one folder that state the same nine values are copies."""
    stated = {
        name: {(key, str(value)) for key, value in leaves(body(name)) if "_target_" not in key}
        for name in NAMES
    }
    copies = [
        (first, second)
        for first, second in itertools.combinations(NAMES, 2)
        if first.rpartition("/")[0] == second.rpartition("/")[0] and len(stated[first] & stated[second]) >= 9
    ]
    assert not copies


# ---- every key reaches code -------------------------------------------------------------------------------


def words_of_code() -> set[str]:
    """Names by which code can read a key: attributes, arguments, keywords and the words of plain strings."""
    words = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            for field in ("attr", "arg"):
                words.add(getattr(node, field, None))
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
                words |= set(re.findall(r"\w+", node.value))
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                words.add(node.target.id)
    return words


def keys(part: dict, prefix: str = "") -> Iterator[str]:
    """Dotted keys but those under a `_target_`, which its signature holds, and class numbers."""
    for key, value in part.items():
        if isinstance(key, str):
            yield f"{prefix}{key}"
        if isinstance(value, dict) and "_target_" not in value:
            yield from keys(value, f"{prefix}{key}.")


def test_every_key_outside_the_model_is_a_word_of_the_code():
    """The keys of models are tried one by one: tests/test_knobs.py."""
    known, unread = words_of_code() | set(body("trainer/default")), []  # the latter go to Lightning
    for name in NAMES:
        if not name.startswith("model/") and "_target_" not in body(name):
            stated = body(name)
            for key in ("hydra", "model"):
                stated.pop(key, None)
            stated |= {f"card {card}": facts for card, facts in stated.pop("cards", {}).items()}
            found = (key for key in keys(stated) if not key.startswith("card ") or "." in key)
            unread += [f"{name}: {key}" for key in found if key.rpartition(".")[2] not in known]
    assert not unread


def test_every_key_under_hydra_is_hydra_s():
    known, stated = OmegaConf.structured(HydraConf), [body(name).get("hydra") for name in NAMES]
    assert any(stated)
    for part in filter(None, stated):
        OmegaConf.merge(known, part)  # raises ConfigKeyError for a key that Hydra has not
    with pytest.raises(ConfigKeyError):
        OmegaConf.merge(known, {"runn": {"dir": "."}})
