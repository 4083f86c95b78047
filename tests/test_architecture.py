"""Imports run downwards, as docs/architecture.md lays the layers out, and a name has one definition."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "medldm"
LEAVES = {"attributes", "errors", "batch", "files", "fingerprints", "held_out", "ranks", "devices"}
# package or module -> what of medldm it may import, beside itself and the leaves
MAY_IMPORT = {
    "attributes": set(),
    "errors": set(),
    "batch": set(),
    "files": set(),
    "fingerprints": set(),
    "held_out": set(),
    "ranks": set(),
    "devices": set(),
    "networks": set(),
    "data": set(),
    "metrics": {"networks"},
    "losses": {"networks"},
    "diffusion": {"networks"},
    "plots": {"diffusion"},
    "models": {"diffusion", "networks", "losses", "metrics", "plots"},
    "parts": set(),
    "checkpoints": {"parts"},
    "build": {"parts", "checkpoints", "models", "diffusion", "networks", "losses"},
    "callbacks": {"models", "plots"},
    "runs": set(),
    "knobs": set(),
    "asked": {"data", "knobs"},
    "inference": {"data"},
    "sampling": {"inference", "models", "diffusion", "networks", "data"},
    "conditions": set(),
    "translating": {"sampling", "data", "models"},
    # what `import medldm` offers, above all but commands
    "interface": {
        "build",
        "conditions",
        "data",
        "diffusion",
        "inference",
        "models",
        "sampling",
        "translating",
    },
    "synthesis": {"conditions", "data", "diffusion", "models", "outputs", "sampling"},
    "outputs": {"data", "callbacks", "plots"},
    "evaluation": {"build", "data", "inference", "metrics", "models", "networks"},
    "reporting": {"evaluation", "data", "metrics"},
    "planning": {"build", "checkpoints", "models", "networks", "losses", "data"},
    "doctor": {"networks"},
    "shrinking": set(),
    "training": {
        "build",
        "callbacks",
        "checkpoints",
        "data",
        "diffusion",
        "knobs",
        "models",
        "runs",
        "shrinking",
    },
    "cli": set(),
    "overrides": set(),
    "__main__": {"cli"},
}
HYDRA = {"cli", "commands", "build", "checkpoints", "overrides", "synthesis", "training"}
# data.phantoms.swirl is a data module too: points that are made on the fly
LIGHTNING = {
    "models",
    "data.loading.datamodule",
    "data.phantoms.swirl",
    "callbacks",
    "build",
    "checkpoints",
    "commands",
    "training",
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        yield name, ast.parse(path.read_text())


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


IMPORTS = [(name, target) for name, tree in modules() for target in imports(tree) if name != "__init__"]


def is_within(name: str, allowed: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in allowed)


def test_no_module_imports_one_above_it():
    wrong = []
    for name, target in IMPORTS:
        package, _, rest = name.partition(".")
        if package != "commands" and target.startswith("medldm."):
            allowed = MAY_IMPORT[package] | LEAVES | {package}
            if target.split(".")[1] not in allowed:
                wrong.append(f"{name} imports {target}")
    assert not wrong


@pytest.mark.parametrize(
    ("libraries", "allowed"),
    [(("hydra", "omegaconf"), HYDRA), (("pytorch_lightning", "lightning_fabric"), LIGHTNING)],
    ids=["hydra", "lightning"],
)
def test_configs_and_lightning_stay_in_their_places(libraries, allowed):
    wrong = [
        f"{name} imports {target}"
        for name, target in IMPORTS
        if target.split(".")[0] in libraries and not is_within(name, allowed)
    ]
    assert not wrong


def test_commands_do_not_import_each_other():
    names = {name.removeprefix("commands.") for name, _ in IMPORTS if name.startswith("commands.")}
    targets = {target.split(".")[2] for _, target in IMPORTS if target.startswith("medldm.commands.")}
    assert not targets & names


# Names that several modules define on purpose: what each command, dataset or module must have.
SHARED_NAMES = {"__all__", "log", "main", "task", "load"}  # load: `medldm.load`, and of stored images
SHARED_BY_DATASETS = {"index", "published_splits", "published", "patient_of", "MODALITIES"}
# Duplicates of other rooms that are still to be renamed; nothing may be added.
TO_RENAME = {
    "BLOCK",
    "CHUNK_ELEMENTS",
    "LATENTS",
    "Measured",
    "NUM_NAMED",
    "UNITS",
    "Values",
    "candidates",
    "check_subjects",
    "describe",
    "folded",
    "known_facts",
    "new_figure",
    "notes",
    "on_grid",
    "run",
    "spread",
    "to_html",
    "to_markdown",
    "to_uint8",
}


def top_level_names(tree: ast.Module) -> set[str]:
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names |= {
            part.id for target in targets if target for part in ast.walk(target) if isinstance(part, ast.Name)
        }
    return names


def test_no_public_name_is_defined_twice():
    """A reader who looks for a name finds one definition; names of datasets' interface count once."""
    homes: dict[str, list[str]] = {}
    for module, tree in modules():
        for name in top_level_names(tree):
            homes.setdefault(name, []).append(module)
    twice = {
        name: found
        for name, found in homes.items()
        if len(found) > 1
        and not name.startswith("_")
        and name not in SHARED_NAMES | TO_RENAME
        and not (name in SHARED_BY_DATASETS and all(module.startswith("data.datasets") for module in found))
    }
    assert not twice, f"rename one of each, or list it above with its reason: {twice}"
