"""A command line that Hydra does not take is answered with the words that it would take."""

import ast
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from medldm.commands import adopt_renamed, user_message
from medldm.overrides import RENAMED, check_dashes, explain, misread_path
from tests.helpers import CONFIG_DIR, compose_config

SOURCE = Path(__file__).resolve().parents[2] / "src" / "medldm"


def told(monkeypatch, name: str, *arguments: str) -> str:
    """The line that a command prints for its arguments, without its name."""
    monkeypatch.setattr(sys, "argv", ["medldm", *arguments])
    with pytest.raises(Exception) as caught:
        compose_config(name, *arguments)
    return user_message(caught.value, name)


@pytest.mark.parametrize(
    "value",
    [
        "/a/b=c",
        "/daten/Müller",
        "/a [x] (1)/b",
        "/a,b",
        "it's here",
        'say "x"',
        "a;b",
        "C:\\x=\\",
        "50%=&|<>*?!#",
    ],
)
def test_the_words_that_are_suggested_give_the_value_when_pasted(monkeypatch, value):
    line = told(monkeypatch, "prepare", f"data.root={value}")
    suggestion = re.search(r"write (.*?)(?: for one text.*)?$", line)[1]
    (word,) = shlex.split(suggestion)
    override = OverridesParser.create().parse_override(word)
    assert (override.key_or_group, override.value()) == ("data.root", value)


def test_lists_keep_their_elements_and_the_home_folder_is_written_out(monkeypatch):
    line = told(monkeypatch, "prepare", "data.views=[kurze Achse, Lange=Ä]")
    (word,) = shlex.split(
        line.partition("; a value")[2].partition("write ")[2] or line.rpartition("write ")[2]
    )
    assert OverridesParser.create().parse_override(word).value() == ["kurze Achse", "Lange=Ä"]
    home = told(monkeypatch, "prepare", "data.root=~/images").rpartition("write ")[2]
    assert home == f"data.root={Path('~/images').expanduser()}"


@pytest.mark.parametrize(
    ("name", "arguments", "line"),
    [
        ("prepare", ("data.root",), "'data.root': write key=value, without spaces around the ="),
        (
            "prepare",
            ("data.views=[SA",),
            "brackets or quotes do not match; write lists as 'data.views=[a, b]'",
        ),
        ("prepare", ("data.batchsize=3",), "no key data.batchsize; did you mean data.batch_size?"),
        (
            "prepare",
            ("data=brats", "data.preprocess.labels.mapping={3: 3}"),
            "adds what is not there yet; write '+data.preprocess.labels.mapping={3: 3}'",
        ),
        ("prepare", ("batch_size=3",), "no key batch_size; did you mean data.batch_size?"),
        ("train", ("experiment=cardiac2d/ldm", "model.sampler.steps=3"), "no key model.sampler.steps"),
        ("train", ("experiment=cardiac2d/ldmm",), "did you mean experiment=cardiac2d/ldm?"),
        ("prepare", ("data=foldr",), "data=foldr: no such choice; did you mean data=folder?"),
        (
            "train",
            ("experiment=cardiac2d/ldm", "model/schedule=kosine"),
            "model/schedule=kosine: no such choice",
        ),
    ],
)
def test_mistakes_name_what_was_meant(monkeypatch, name, arguments, line):
    found = told(monkeypatch, name, *arguments)
    assert line in found and "\n" not in found


def test_dashes_numbers_for_folders_and_missing_keys_are_told():
    assert check_dashes(["--cfg", "job", "-m", "data.root=/x"]) is None
    assert check_dashes(["--data.root=/x"]) == (
        "'--data.root=/x': keys are written without dashes, as data.root=VALUE"
    )
    cfg = OmegaConf.to_container(compose_config("prepare", "data.root=1e3"))
    line = "data.root=1e3: is read as the float 1000.0; write data.root=./1e3"
    assert misread_path(cfg, ["data.root=1e3"]) == line
    assert misread_path(OmegaConf.to_container(compose_config("prepare", "data.root=./7")), []) is None
    assert explain(ValueError("another"), "prepare", [], CONFIG_DIR) is None
    with pytest.raises(Exception) as caught:
        compose_config("prepare").data.root  # noqa: B018
    assert user_message(caught.value, "prepare") == (
        "data.root: not given; write data.root=... on the command line"
    )


# ---- advice ----

ROOTS = ("data", "model", "trainer", "callbacks", "sampler", "windows", "logger", "paths", "interpolate")
KEY = re.compile(r"(?<![\w./])(?:" + "|".join(ROOTS) + r")(?:\.[a-z_0-9]+)+")


def messages() -> list[tuple[str, str]]:
    """(file, text) of every InputError; what is filled in stands as {}."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "InputError" and node.args:
                parts = [
                    part.value if isinstance(part, ast.Constant) else "{}"
                    for part in getattr(node.args[0], "values", [node.args[0]])
                ]
                found.append((path.name, "".join(map(str, parts))))
    return found


def keys_of(node: dict, prefix: str) -> set[str]:
    inner = [keys_of(value, f"{prefix}{key}.") for key, value in node.items() if isinstance(value, dict)]
    return {f"{prefix}{key}" for key in node}.union(*inner)


def all_keys() -> set[str]:
    """The keys of every config file, below the names of its groups."""
    keys = set(ROOTS)
    for path in CONFIG_DIR.rglob("*.yaml"):
        node = yaml.safe_load(path.read_text()) or {}
        groups = path.relative_to(CONFIG_DIR).parts[:-1]
        groups = () if groups[:1] in (("experiment",), ("debug",)) else groups
        keys |= keys_of(node, ".".join((*groups, "")) if groups else "")
        keys.add(".".join(groups))
        if groups[-1:] == ("translation_loss",):  # taken as model.objective
            keys |= keys_of(node, "model.objective.")
        if groups == ("model", "network"):  # an autoencoder's is taken as model.autoencoder
            keys |= keys_of(node, "model.autoencoder.")
    return keys


def test_every_key_in_a_message_exists():
    known = all_keys()
    free = (
        "data.edge_degrade.",  # mappings of the user's own
        "trainer.gradient_clip_algorithm",  # of Lightning's Trainer, which people add
    )
    wrong = [
        (file, found[0], text)
        for file, text in messages()
        for found in KEY.finditer(text)
        if text[found.end() : found.end() + 1] not in ("{", "(", "*")
        and found[0] not in known
        and not found[0].startswith(free)
    ]
    assert not wrong


def test_former_names_of_members_still_work_and_are_told(monkeypatch, capsys):
    words = [
        "experiment=cardiac2d/ldm_seed",
        "+model/network@model.autoencoder=vqvae_author,vqvae_f8",
        "seed=1",
    ]
    monkeypatch.setattr(sys, "argv", ["medldm", *words])
    adopt_renamed("train")
    now = ["experiment=cardiac2d/ldm_published", "+model/network@model.autoencoder=vqvae_as_run,vqvae_f8"]
    assert sys.argv[1:] == [*now, "seed=1"]
    assert capsys.readouterr().err.splitlines() == [
        f"medldm train: {old} is deprecated; write {new}" for old, new in zip(words, now, strict=False)
    ]


def test_former_names_stand_for_members_that_are_there():
    for group, names in RENAMED.items():
        folder = CONFIG_DIR / ("experiment" if group.endswith("_experiment") else group)
        assert all((folder / f"{name}.yaml").is_file() for name in names.values())
        assert not any((folder / f"{name}.yaml").exists() for name in names)


def test_a_number_in_the_place_of_a_choice_is_told_with_the_choices():
    error = ValueError("Config group override must be a string or a list. Got float")
    line = explain(error, "evaluate", ["metrics=1e20"], CONFIG_DIR)
    assert line.startswith("metrics=1e20: no such choice; choose from segmentation, synthesis,")
