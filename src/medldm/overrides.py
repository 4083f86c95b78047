"""Explains in one line why Hydra refuses a command line, with the words that it would accept."""

import difflib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from medldm.errors import InputError

PATH_KEYS = (
    "raw", "root", "run_dir", "output", "checkpoint", "resume", "init_from", "generated", "reference",
    "source", "reconstruction", "train", "segmenter", "synthetic", "weights", "output_root", "label_dir",
)  # fmt: skip
NO_CHOICE = "Config group override must be"  # of a number, for instance, in the place of a member's name
SUFFICES = "`medldm {name} --cfg job` prints every key"
# Group -> former and present names of its members, which compose to the same config.
RENAMED = {
    "experiment": {
        "cardiac2d/vqvae_seed": "cardiac2d/vqvae_published",
        "cardiac2d/vqvae_author": "cardiac2d/vqvae_as_run",
        "cardiac2d/ldm_seed": "cardiac2d/ldm_published",
        "cardiac2d/ldm_author": "cardiac2d/ldm_as_run",
        "medlsdm/autopet_vqgan_author": "medlsdm/autopet_vqgan_published",
        "medlsdm/autopet_ldm_author": "medlsdm/autopet_ldm_published",
    },
    "data": {"mnms2_author": "mnms2_as_run"},
    "model/conditioner": {"strided_cnn_seed": "strided_cnn_published"},
    "model/first_stage": {"vq_author": "vq_unscaled"},
    "model/network": {
        "unet_report": "unet_cardiac",
        "unet_seed": "unet_cardiac_published",
        "unet_author": "unet_cardiac_as_run",
        "unet_semantic_author": "unet_semantic_published",
        "vqgan3d_author": "vqgan3d_published",
        "vqvae_seed": "vqvae_published",
        "vqvae_author": "vqvae_as_run",
    },
}
RENAMED |= dict.fromkeys(("first_stage_experiment", "map_stage_experiment"), RENAMED["experiment"])


def parsed(word: str) -> Any:
    """The value that Hydra reads in `key=value`, or None where it does not read it."""
    try:
        return OverridesParser.create().parse_override(word).value()
    except HydraException:
        return None


def renamed(word: str) -> str:
    """An override as it is written today: the former name of a member becomes the present one."""
    key, equals, value = word.partition("=")
    names = RENAMED.get(key.lstrip("+").partition("@")[0])
    if not names:
        return word
    return key + equals + ",".join(names.get(name, name) for name in value.split(","))


def in_quotes(text: str) -> str:
    """A text as Hydra's quoted string."""
    text = re.sub(r'(\\*)"', lambda found: 2 * found[1] + '\\"', text)
    return '"' + re.sub(r"(\\+)$", r"\1\1", text) + '"'


def elements(text: str) -> list[str]:
    """The elements of `[a, b]` as they stand, without quotes of their own."""
    parts = (part.strip() for part in text[1:-1].split(","))
    return [part[1:-1] if part[:1] in "'\"" and part[:1] == part[-1:] else part for part in parts if part]


def shell_word(key: str, value: str) -> str | None:
    """`key=value` as it is typed into a shell, so that Hydra reads this very text, or this list of texts;
    None where its brackets do not close.
    """
    if value.startswith("~/"):
        value = str(Path(value).expanduser())
    if value[:1] + value[-1:] == "[]":
        word = f"{key}=[{', '.join(map(in_quotes, elements(value)))}]"
        return shlex.quote(word) if parsed(word) == elements(value) else None
    if value[:1] in ("[", "{"):
        return None
    word = f"{key}={value}" if parsed(f"{key}={value}") == value else f"{key}={in_quotes(value)}"
    return shlex.quote(word) if parsed(word) == value else None


def tell_unread(argument: str) -> str:
    """What to do about an argument that is no `key=value` to Hydra."""
    key, equals, value = argument.partition("=")
    if not equals or not key.strip():
        return f"'{argument}': write key=value, without spaces around the ="
    if key != key.strip():
        return f"'{argument}': write {key.strip()}=..., without spaces around the ="
    word = shell_word(key, value)
    if word is None:
        return f"'{argument}': its brackets or quotes do not match; write lists as '{key}=[a, b]'"
    return f"'{argument}': a value with such signs needs quotes; write {word}"


def known_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Every key of a config, dotted."""
    for key in node:
        yield f"{prefix}{key}"
        child = node._get_node(key)
        if hasattr(child, "keys") and not child._is_none() and not child._is_missing():
            yield from known_keys(child, f"{prefix}{key}.")


def nearest(word: str, known: Sequence[str]) -> str | None:
    """The known word that was meant, if any: the one that looks alike, or the only one that ends in the same
    key.
    """
    same_end = [key for key in known if key.rpartition(".")[2] == word.rpartition(".")[2]]
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.75)
    return found[0] if found else same_end[0] if len(same_end) == 1 else None


def config_keys(name: str, arguments: Sequence[str], config_dir: Path) -> list[str]:
    """The keys of a command's config under the groups that a command line chooses."""
    chosen = [word for word in arguments if re.fullmatch(r"[+\w/@]+=[\w/]+", word) and "." not in word]
    groups = [word for word in chosen if (config_dir / word.partition("=")[0].lstrip("+")).is_dir()]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir), version_base="1.3"):
            return list(known_keys(compose(name, overrides=groups)))
    except HydraException:
        return []


def tell_unknown(key: str, name: str, arguments: Sequence[str], config_dir: Path) -> str:
    """What to write in the place of a key that the command does not have."""
    known = config_keys(name, arguments, config_dir)
    if key in known:  # a mapping, which Hydra extends only where it is told to
        word = next((word for word in arguments if word.startswith(f"{key}=")), f"{key}=...")
        return f"{key}: adds what is not there yet; write {shlex.quote('+' + word)}"
    meant = nearest(key, known)
    return f"no key {key}; " + (f"did you mean {meant}? " if meant else "") + SUFFICES.format(name=name)


def explain(error: BaseException, name: str, arguments: Sequence[str], config_dir: Path) -> str | None:
    """The line in the place of what Hydra says of a command line, or None where Hydra says it well enough
    itself.
    """
    text = str(error)
    unread = getattr(error, "override", None)
    if isinstance(unread, str):
        return tell_unread(unread)
    if found := re.search(r"Error parsing override '(.*?)'\n", text):
        return tell_unread(found[1])
    if found := re.search(r"Ambiguous value for argument '(.*?)'\n", text):
        key, _, value = found[1].partition("=")
        return f"'{found[1]}': write {shell_word(key, value)} for one text, or '{key}=[{value}]' for a list"
    if found := re.search(r"Could not override '(\S+?)'", text):
        return tell_unknown(found[1], name, arguments, config_dir)
    if NO_CHOICE in text:
        groups = (word for word in arguments if (config_dir / word.partition("=")[0]).is_dir())
        wrong = (word for word in groups if not isinstance(parsed(word), str | list))
        return next((tell_no_choice(w.replace("=", "/", 1), arguments, config_dir) for w in wrong), text)
    if found := re.search(r"Could not find '(\S+?)'\n", text):
        return tell_no_choice(found[1], arguments, config_dir)
    return None


def line_of_job(error: BaseException, name: str) -> str | None:
    """What a job of a sweep, which submitit ran elsewhere, has told in one line; None where it has not."""
    if not type(error).__module__.startswith("submitit"):
        return None
    told = re.findall(rf"^medldm {name}: (.*)$", str(error), re.MULTILINE)
    return told[-1] if told else None


def tell_no_choice(path: str, arguments: Sequence[str], config_dir: Path) -> str | None:
    """What a group offers in the place of `path`, a file that it does not have; None where `path` lies in no
    group.
    """
    words = (word.lstrip("+") for word in arguments if "=" in word)
    group = next((word.partition("=")[0] for word in words if word.replace("=", "/", 1) == path), None)
    if group == "hydra/launcher" and (choice := path.removeprefix(f"{group}/")).startswith("submitit"):
        return f"{group}={choice}: needs hydra-submitit-launcher; run `pip install 'medldm[sweep]'`"
    folder = config_dir / (group or path.rpartition("/")[0])
    known = [str(file.relative_to(folder).with_suffix("")) for file in sorted(folder.rglob("*.yaml"))]
    if group is None or not known:
        return None
    choice = path.removeprefix(f"{group}/")
    meant = nearest(choice, known)
    offer = f"did you mean {group}={meant}?" if meant else f"choose from {', '.join(known)}"
    return f"{group}={choice}: no such choice; {offer}"


def check_dashes(arguments: Sequence[str]) -> str | None:
    """The line for options such as --key, which are no keys and which Hydra would answer with its whole
    usage; None where there are none.
    """
    flags = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    for word in arguments:
        if word.startswith("-") and word.partition("=")[0] not in flags and not word.lstrip("-").isdigit():
            return f"'{word}': keys are written without dashes, as {word.lstrip('-').partition('=')[0]}=VALUE"
    return None


def check_paths(cfg: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """InputError for a path that Hydra took for a number, or for true or false, and for ??? as a value."""
    if word := next((word for word in arguments if word.partition("=")[2] == "???"), None):
        raise InputError(f"{word}: stands for what is not given; give a value, or leave it out")
    if line := misread_path(cfg, arguments):
        raise InputError(line)


def misread_path(cfg: Mapping[str, Any], arguments: Sequence[str], prefix: str = "") -> str | None:
    """The line for a path that Hydra took for a number, or for true or false; None where there is none."""
    for key, value in cfg.items():
        if isinstance(value, Mapping):
            if line := misread_path(value, arguments, f"{prefix}{key}."):
                return line
        elif key in PATH_KEYS and isinstance(value, int | float):
            start = f"{prefix}{key}="
            typed = next((word.removeprefix(start) for word in arguments if word.startswith(start)), value)
            return f"{start}{typed}: is read as the {type(value).__name__} {value}; write {start}./{typed}"
    return None


def typed_overrides() -> list[str] | None:
    """The overrides as they were typed, such as `data.raw=DIR`; None outside the command line."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else None


def typed_command() -> str | None:
    """The whole command as a shell would read it again, `medldm demo output=DIR` for all that the demo runs;
    None outside the command line.
    """
    overrides = typed_overrides()
    if overrides is None:
        return None
    return shlex.join(["medldm", HydraConfig.get().job.config_name, *overrides])
