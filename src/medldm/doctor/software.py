"""Checks the versions of the packages that medldm needs, and the extras that are installed."""

import platform
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

import medldm
from medldm.doctor.finding import TO_NOTE, WRONG, Finding

SHOWN = ("torch", "torchvision", "pytorch-lightning", "hydra-core", "monai", "numpy")
EXTRAS = {
    "dicom": "DICOM series, such as Duke Breast as published",
    "itk": "MetaImage (.mha), such as SynthRAD2025 as published",
}


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def requirements() -> list[Requirement]:
    """The requirements in medldm's metadata, with extras; empty where it was not installed as a package."""
    try:
        return [Requirement(text) for text in requires("medldm") or ()]
    except PackageNotFoundError:
        return []


def software_findings(needed: Sequence[Requirement] | None = None) -> Iterator[Finding]:
    """Findings about Python and medldm, the main packages, and each that is missing or of another version."""
    needed = requirements() if needed is None else needed
    about = f"medldm {medldm.__version__}, Python {platform.python_version()}, {platform.system()}"
    yield Finding("software", "versions", about)
    always = [r for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    broken = [finding for r in always if (finding := check_version(r)) is not None]
    versions = ", ".join(f"{name} {installed(name)}" for name in SHOWN if installed(name))
    yield Finding("software", "packages", versions)
    yield from broken
    yield from extra_findings(needed)


def check_version(needed: Requirement) -> Finding | None:
    """What is wrong with one required package, None where nothing is."""
    found = installed(needed.name)
    wanted = f"'{needed.name}{needed.specifier}'"
    if found is None:
        return Finding("software", needed.name, "not installed", WRONG, f"pip install {wanted}")
    if not needed.specifier.contains(found, prereleases=True):
        text = f"{found}, but medldm needs {needed.specifier}"
        return Finding("software", needed.name, text, WRONG, f"pip install --upgrade {wanted}")
    return None


def extra_findings(needed: Sequence[Requirement]) -> Iterator[Finding]:
    for extra, purpose in EXTRAS.items():
        packages = [
            r.name
            for r in needed
            if r.marker and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""})
        ]
        missing = [name for name in packages if installed(name) is None]
        if missing:
            mend = f"pip install 'medldm[{extra}]', where you need it"
            yield Finding("software", f"extra {extra}", f"not installed: {purpose}", TO_NOTE, mend)
        elif packages:
            yield Finding("software", f"extra {extra}", ", ".join(f"{n} {installed(n)}" for n in packages))
