"""Compares two evaluations of the same images: paired differences, with intervals and tests."""

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medldm.errors import InputError
from medldm.evaluation.names import first_names
from medldm.evaluation.screen import Lines, brief, cell
from medldm.metrics.catalogue import better
from medldm.metrics.permutation import sign_test
from medldm.metrics.summary import Bootstrap
from medldm.schemas import Metrics, read_checked

ROW = "generated"


class Evaluated(NamedTuple):
    """The generated images of one evaluation: by name their subject and metrics, and metrics.json."""

    path: Path
    subjects: Mapping[str, str]
    values: Mapping[str, Mapping[str, float]]  # metric -> image -> value, without images that have none
    results: Mapping


def read_evaluated(folder: Path) -> Evaluated:
    """What `medldm evaluate` wrote into a folder. InputError where that is not there or not complete."""
    paths = [folder / name for name in ("metrics.json", "per_case.csv")]
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: not found; run `medldm evaluate ... output={folder}` first")
    try:
        results = read_checked(paths[0], Metrics, "run `medldm evaluate` again")
        with open(paths[1], newline="") as file:
            lines = [line for line in csv.DictReader(file) if line["row"] == ROW]
        names = [name for name in results["definitions"] if lines and name in lines[0]]
        values = {
            name: {line["id"]: float(line[name]) for line in lines if line[name] != ""} for name in names
        }
        return Evaluated(folder, {line["id"]: line["subject"] for line in lines}, values, results)
    except InputError:
        raise
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise InputError(
            f"{folder}: not written by this version of `medldm evaluate`; run it again"
        ) from error


def compare_evaluations(first: Evaluated, second: Evaluated, bootstrap: Bootstrap) -> dict:
    """Paired differences, first minus second, of every metric that both have, over the images that both have.

    A difference comes with the interval of a bootstrap over subjects and the `p_value` of a test that
    exchanges the runs' values subject by subject. Distances between sets are given side by side: they have no
    values by image.
    """
    common = sorted(first.subjects.keys() & second.subjects.keys())
    if not common:
        raise InputError(f"compare: {first.path} and {second.path} have no image in common")
    other = [name for name in common if first.subjects[name] != second.subjects[name]]
    if other:
        raise InputError(
            f"compare: '{other[0]}' belongs to another subject in {second.path} than in {first.path}"
        )
    table = {}
    for name in (name for name in first.values if name in second.values):
        both = [image for image in common if image in first.values[name] and image in second.values[name]]
        a, b = (np.array([run.values[name][image] for image in both]) for run in (first, second))
        finite = np.isfinite(a) & np.isfinite(b)
        subjects = [first.subjects[image] for image, is_on in zip(both, finite, strict=True) if is_on]
        if subjects:
            table[name] = compare_values(a[finite], b[finite], subjects, bootstrap)
            table[name]["num_excluded"] = len(common) - len(subjects)
    return {
        "compared": [str(first.path), str(second.path)],
        "n": {"images": len(common), "subjects": len({first.subjects[name] for name in common})},
        "metrics": table,
        "distribution": side_by_side(first.results, second.results),
        "warnings": list(warnings_of(first, second, common)),
    }


def compare_values(a: np.ndarray, b: np.ndarray, subjects: Sequence[str], bootstrap: Bootstrap) -> dict:
    """Both means with intervals, their difference, and the test of it; (N,) each, of the same images."""
    return {
        "first": bootstrap(a, subjects).as_dict(),
        "second": bootstrap(b, subjects).as_dict(),
        "difference": bootstrap(a - b, subjects).as_dict(),
        "p_value": sign_test(a - b, subjects, seed=bootstrap.seed),
    }


def side_by_side(first: Mapping, second: Mapping) -> dict:
    """Distances between sets that both evaluations have, each with its n."""
    sets = [results["distribution"].get(ROW, {}) for results in (first, second)]
    kept = ("value", "n", "n_reference")
    return {
        name: {
            which: {key: scores[name][key] for key in kept}
            for which, scores in zip(("first", "second"), sets, strict=True)
        }
        for name in sets[0]
        if name in sets[1]
    }


def warnings_of(first: Evaluated, second: Evaluated, common: Sequence[str]) -> Iterator[str]:
    """What must be considered when the two are compared, such as other settings."""
    for run, other in ((first, second), (second, first)):
        alone = sorted(run.subjects.keys() - set(common))
        if alone:
            what = f"{len(alone)} images of {run.path} are not in {other.path} and take no part"
            yield f"{what} ({first_names(alone)})"
    references = [(run.results.get("inputs") or {}).get("reference") for run in (first, second)]
    if None not in references and references[0] != references[1]:
        yield "the two were measured against differently prepared reference images"
    if len({first.subjects[name] for name in common}) < 6:
        yield "with fewer than 6 subjects no test over subjects can fall below p = 0.05"


def comparison_lines(comparison: Mapping) -> Iterator[Lines]:
    """Tables of a comparison, for the terminal."""
    n = comparison["n"]
    rows = []
    for name, scores in comparison["metrics"].items():
        size = scores["difference"]
        means = [cell(scores[key]) for key in ("first", "second", "difference")]
        sizes = f"{size['n']} ({size['num_subjects']})"
        rows.append([f"{name} ({better(name)})", *means, f"{scores['p_value']:.2g}", sizes])
    title = f"A = {comparison['compared'][0]}, B = {comparison['compared'][1]}: {n['images']} images in both"
    yield Lines(title, ["metric", "A", "B", "A - B", "p", "images (subjects)"], rows)
    sets = [
        [f"{name} ({better(name)})", *(f"{brief(s[k]['value'])} ({s[k]['n']})" for k in ("first", "second"))]
        for name, s in comparison["distribution"].items()
    ]
    if sets:
        yield Lines("distance between sets of images (n)", ["metric", "A", "B"], sets)
