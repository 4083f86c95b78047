"""Imports run downwards, as docs/architecture.md says; names, sizes and pages keep their rules."""

import ast
import re
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "medldm"
LEAVES = {
    "attributes", "batch", "bounds", "devices", "errors", "files", "fingerprints", "held_out", "locks",
    "progress", "ranks", "schemas", "shards", "signatures", "values",
}  # fmt: skip
# package or module -> what of medldm it may import, beside itself and the leaves
MAY_IMPORT = {
    "attributes": set(),
    "errors": set(),
    "batch": set(),
    "files": set(),
    "bounds": set(),
    "locks": set(),
    "shards": set(),
    "signatures": set(),
    "values": set(),
    "schemas": set(),
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
    "tensors": set(),
    "checkpoints": {"parts", "tensors"},
    "sharing": {"checkpoints", "tensors"},
    "exporting": {"data", "outputs"},
    "averages": {"checkpoints"},
    "builders": {"parts", "models", "diffusion"},
    "build": {"builders", "checkpoints", "models", "diffusion"},
    "callbacks": {"averages", "models", "plots"},
    "runs": set(),
    "knobs": set(),
    "asked": {"data", "knobs"},
    "inference": {"data"},
    "auditing": {"inference", "models", "networks", "data"},
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
    "synthesis": {"averages", "conditions", "data", "diffusion", "models", "outputs", "sampling"},
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
        "networks",
        "runs",
        "shrinking",
    },
    "cli": set(),
    "overrides": set(),
    "__main__": {"cli"},
}
HYDRA = {"cli", "commands", "builders", "checkpoints", "overrides", "synthesis", "training"}
# data.phantoms.swirl is a data module too: points that are made on the fly
LIGHTNING = {
    "models",
    "data.loading.datamodule",
    "data.phantoms.swirl",
    "callbacks",
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


def is_within(name: str, allowed: Collection[str]) -> bool:
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


def imported_at_once(tree: ast.Module) -> Iterator[str]:
    """Modules of medldm that a module imports as it is imported: not in a function, not for types."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom | ast.Import):
            for target in imports(ast.Module([node], [])):
                yield target.removeprefix("medldm.")


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: set(imported_at_once(tree)) for name, tree in modules()}
    for name, targets in graph.items():  # a name of a module is the module
        named = {target if target in graph else target.rpartition(".")[0] for target in targets}
        graph[name] = {target for target in named if target in graph}
    assert sum(map(len, graph.values())) > 300
    while free := {name for name, targets in graph.items() if not targets & graph.keys()}:
        graph = {name: targets for name, targets in graph.items() if name not in free}
    assert sorted(graph) == []


# ---- words ----

OF_ARGUMENTS = ("networks", "diffusion", "metrics", "models", "losses")  # their messages name no config key
CONFIG_KEY = re.compile(r"\b(data|model|trainer|sampler|callbacks|metrics)(\.[a-z_]+|/[a-z_]+=|=)")


def messages(tree: ast.AST) -> Iterator[str]:
    """What a module says: the strings in what it raises and in what it logs."""
    for node in ast.walk(tree):
        is_log = isinstance(node, ast.Call) and ast.unparse(node.func).startswith("log.")
        if isinstance(node, ast.Raise) or is_log:
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value


def test_networks_and_losses_speak_of_their_arguments():
    """Whoever builds a part from a config adds the key: `errors.told_of`."""
    said = [
        (name, text) for name, tree in modules() if is_within(name, OF_ARGUMENTS) for text in messages(tree)
    ]
    assert len(said) > 100
    assert [(name, text) for name, text in said if CONFIG_KEY.search(text)] == []
    found, *_ = messages(ast.parse("raise ValueError(f'model.network.film={film} is unknown')"))
    assert CONFIG_KEY.search(found)


# Names that several modules define on purpose, each with its reason.
SHARED_NAMES = {
    "__all__": "what a package offers",
    "log": "the logger of a module",
    "main": "the entry of a command: Hydra's decorator needs one in each",
    "task": "what a command does, apart from its entry",
    "load": "medldm.load is the public name; evaluation loads a stored image with its own",
    "to_html": "the two tables of `medldm report table=...` have the same two functions",
    "to_markdown": "as to_html",
    "index": "every dataset's module has it",
    "published_splits": "of all datasets, and of the one that has any",
    "published": "what a dataset's publication says of its files: optional in a dataset's module",
    "patient_of": "the subject in a dataset's file names",
    "MODALITIES": "of a dataset",
}
BY_DATASETS = {"index", "published_splits", "published", "patient_of", "MODALITIES"}  # in data.datasets alone


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
    """A reader who looks for a name finds one definition."""
    homes: dict[str, list[str]] = {}
    for module, tree in modules():
        for name in top_level_names(tree):
            homes.setdefault(name, []).append(module)
    twice = {name: found for name, found in homes.items() if len(found) > 1 and not name.startswith("_")}
    astray = {
        name
        for name in BY_DATASETS & twice.keys()
        if not all(module.startswith("data.datasets") for module in twice[name])
    }
    unlisted = {name: found for name, found in twice.items() if name not in SHARED_NAMES or name in astray}
    assert not unlisted, f"rename one of each, or list it above with its reason: {unlisted}"
    assert not SHARED_NAMES.keys() - twice.keys() - {"__all__"}, "listed above, but defined once"


# ---- sizes ----

CODE = [*sorted(SOURCE.rglob("*.py")), *sorted((SOURCE.parents[1] / "scripts").rglob("*.py"))]
LONGEST_FILE, LONGEST_COMMAND, LONGEST_FUNCTION, MOST_ARGUMENTS = 400, 149, 49, 15


def definitions(kind: type) -> Iterator[tuple[Path, ast.AST]]:
    for path in CODE:
        yield from ((path, node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kind))


def test_files_and_commands_are_short():
    lengths = {path: len(path.read_text().splitlines()) for path in CODE}
    too_long = {
        str(path): length
        for path, length in lengths.items()
        if length > (LONGEST_COMMAND if path.parent.name == "commands" else LONGEST_FILE)
    }
    assert len(lengths) > 100 and not too_long


def test_functions_are_short():
    functions = definitions(ast.FunctionDef | ast.AsyncFunctionDef)
    lengths = {f"{path}: {node.name}": node.end_lineno - node.lineno + 1 for path, node in functions}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


def constructors() -> dict[str, tuple[set[str], list[str], bool]]:
    """class -> (arguments of its `__init__` but self, names of its bases, whether it takes `**options`)."""
    found = {}
    for _, node in definitions(ast.ClassDef):
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                arguments = [*part.args.posonlyargs, *part.args.args, *part.args.kwonlyargs]
                bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
                found[node.name] = ({a.arg for a in arguments} - {"self"}, bases, part.args.kwarg is not None)
    return found


def test_constructors_take_few_arguments():
    """Arguments that a class hands on to its base by `**options` count as its own."""
    known = constructors()

    def arguments(name: str) -> set[str]:
        if name not in known:
            return set()
        own, bases, hands_on = known[name]
        return own.union(*(arguments(base) for base in bases)) if hands_on else own

    counts = {name: len(arguments(name)) for name in known}
    assert len(counts) > 30
    assert {name: count for name, count in counts.items() if count > MOST_ARGUMENTS} == {}


# ---- pages ----

ROOT = SOURCE.parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_architecture_page_has_every_package():
    text = (ROOT / "docs/architecture.md").read_text()
    layers = text[text.index("## Layers") : text.index("## Where to add")]
    packages = {
        path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert packages - {"__init__", "__main__"} - {name for name in packages if f"`{name}`" in layers} == set()


def test_pages_name_modules_and_tests_that_exist():
    files = {
        str(path.relative_to(ROOT))
        for top in ("src", "tests", "scripts")
        for path in (ROOT / top).rglob("*.py")
    }
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    unknown = []
    for page in PAGES:
        text = page.read_text()
        named = set(re.findall(r"`([\w/]+\.py)\b", text)) - {"data/datasets/NAME.py"}
        unknown += [
            f"{page.name}: {name}"
            for name in named
            if not any(f"/{file}".endswith(f"/{name}") for file in files)
        ]
        unknown += [
            f"{page.name}: {test}"
            for test in re.findall(r"::(test_\w+)`", text)
            if f"def {test}(" not in tests
        ]
    assert not unknown
