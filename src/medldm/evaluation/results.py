"""The content of metrics.json and per_case.csv: numbers with n, range, implementation, networks, seeds."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from medldm.evaluation.baselines import describe_row
from medldm.evaluation.conditions import Conditions
from medldm.evaluation.distances import distances
from medldm.evaluation.matching import Match
from medldm.evaluation.measure import Measured
from medldm.evaluation.names import NUM_NAMED
from medldm.evaluation.notes import (
    FRECHET,
    describe_condition,
    warn_cases,
    warn_constant,
    warn_incomplete,
    warn_map,
    warn_rescaled,
    warn_small,
)
from medldm.evaluation.pairs import Pair, count_subjects
from medldm.evaluation.tools import Tools, entry_of
from medldm.metrics.catalogue import define, find_metric
from medldm.metrics.memorization import audit_copies, memorized_share
from medldm.metrics.summary import Bootstrap, Table, paired_differences, select, summarise, summarise_groups

PACKAGES = ("torch", "torchmetrics", "scikit-image", "torch-fidelity", "numpy", "opencv-python-headless")
KERNEL = "unbiased MMD^2, polynomial kernel (x.y / D + 1)^3"
ESTIMATORS = {"frd": f"logarithm of, of standardised features: {FRECHET}"}
NEAR = 0.05  # of the real held-out images are as near to a training image as this share says


def jsonable(value: object) -> object:
    """Plain JSON: infinities as strings, NaN as null, paths as text."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [jsonable(item) for item in value]
    if isinstance(value, np.generic):
        return jsonable(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return str(value) if isinstance(value, Path) else value


def table_dict(table: Table) -> dict:
    return {row: {name: item.as_dict() for name, item in metrics.items()} for row, metrics in table.items()}


def describe_cases(pairs: Sequence[Pair], measured: Measured) -> dict:
    """On how many images of how many subjects each row is, and which images it lacks. `fingerprint` is that
    of the names of all images: two evaluations with the same fingerprint are on the same images.
    """
    names = sorted(pair.id for pair in pairs)
    rows = {}
    for row in measured.values:
        present = measured.present[row]
        rows[row] = {
            "n": int(present.sum()),
            "num_subjects": len({pair.subject for pair, is_on in zip(pairs, present, strict=True) if is_on}),
            "same_as_generated": bool(np.array_equal(present, measured.present["generated"])),
            "without": [pair.id for pair, is_on in zip(pairs, present, strict=True) if not is_on][:NUM_NAMED],
        }
    return {"fingerprint": hashlib.sha256("\n".join(names).encode()).hexdigest()[:16], "rows": rows}


def generated_beside(measured: Measured, subjects: Sequence[str], bootstrap: Bootstrap) -> dict[str, Table]:
    """For every row that is on fewer images than `generated`: the generated ones on the same images."""
    beside = {}
    for row in measured.values:
        keep = measured.present[row]
        if not np.array_equal(keep, measured.present["generated"]):
            chosen = select({"generated": measured.values["generated"]}, keep)
            beside[row] = summarise(chosen, np.asarray(subjects)[keep].tolist(), bootstrap)["generated"]
    return beside


def describe_networks(tools: Tools) -> dict:
    """Every distribution metric by name: its network and hash, or why it is missing."""
    out: dict[str, dict] = {}
    for key, network in tools.networks.items():
        for name, size in tools.feature_sizes(key).items():
            entry = entry_of(name)
            facts = {"network": entry.description, "sha256": network.sha256, "num_features": size}
            out[entry.frechet_name] = facts | {"estimator": ESTIMATORS.get(entry.frechet_name, FRECHET)}
            if entry.kernel_name:
                out[entry.kernel_name] = facts | {"estimator": KERNEL}
            out |= {
                name: facts | {"estimator": find_metric(name).definition} for name in entry.manifold_names
            }
    if tools.lpips is not None:
        out[tools.lpips_name] = {"network": "LPIPS on [-1, 1], grey repeated", "sha256": tools.lpips.sha256}
    return out | {name: {"missing": why} for name, why in tools.missing.items()}


def dice_ratios(measured: Measured, subjects: Sequence[str], bootstrap: Bootstrap) -> dict:
    """Dice on generated images over Dice on the real ones, by class: 1 means that a segmenter trained on real
    images reads the generated ones as well. `generated` and `real` are the means that it divides, over the
    images where both have the class.
    """
    real, made = measured.values.get("real", {}), measured.values.get("generated", {})
    names = [name for name in made if name.startswith("dice_") and name in real]
    table = {}
    for name in names:
        both = np.isfinite(made[name]) & np.isfinite(real[name])
        means = {
            row: float(values[both].mean()) if both.any() else None
            for row, values in (("generated", made[name]), ("real", real[name]))
        }
        table[name] = bootstrap.ratio(made[name], real[name], subjects).as_dict() | means
    return table


def describe_memorization(pairs: Sequence[Pair], measured: Measured) -> dict:
    """How many generated images lie suspiciously near to a training image; {} without training images."""
    made, real = (measured.values.get(row, {}).get("nearest_train_rmse") for row in ("generated", "real"))
    if made is None or real is None:
        return {}
    made, real = (values[~np.isnan(values)] for values in (made, real))
    if not len(made) or not len(real):
        return {}
    share = memorized_share(made, real, NEAR)
    found = {"memorized_share": share, "quantile": NEAR, "n": len(made), "n_real": len(real)}
    rows = [measured.values[row].get("nearest_train_correlation") for row in ("generated", "real")]
    if any(values is None for values in rows):
        return found
    audit = audit_copies(*(values[~np.isnan(values)] for values in rows))
    closest = np.argsort(-np.nan_to_num(rows[0], nan=-1))[:NUM_NAMED]
    listed = [{"id": pairs[i].id, "correlation": float(rows[0][i])} for i in closest]
    found |= {"audit": audit._asdict(), "closest": listed}
    for space in ("perceptual", "inception"):
        distances = [measured.values[row].get(f"nearest_train_{space}") for row in ("generated", "real")]
        if all(values is not None for values in distances):
            near = audit_copies(*(-values[~np.isnan(values)] for values in distances))
            found[f"{space}_audit"] = near._asdict() | {"threshold": -near.threshold}
    return found


def spacing_of(pairs: Sequence[Pair]) -> object:
    """The voxel size in mm where all volumes have the same."""
    found = {tuple(np.round(np.ravel(s), 4)) for p in pairs if (s := p.attributes.get("spacing")) is not None}
    return list(found.pop()) if len(found) == 1 else None


def metric_names_of(measured: Measured) -> list[str]:
    return list(dict.fromkeys(name for metrics in measured.values.values() for name in metrics))


def group_distances(
    measured: Measured,
    subjects: Sequence[str],
    groups: Mapping[str, Sequence[str | None]],
    kernel: Mapping[str, int],
    seed: int,
) -> dict:
    """Distribution metrics within every group."""
    return {
        group: {
            label: distances(measured, subjects, np.array([m == label for m in members]), kernel, seed)
            for label in sorted({m for m in members if m is not None})
        }
        for group, members in groups.items()
    }


def build_results(
    pairs: Sequence[Pair],
    measured: Measured,
    tools: Tools,
    groups: Mapping[str, Sequence[str | None]],
    bootstrap: Bootstrap,
    kernel: Mapping[str, int],
    diversity: Mapping,
    matches: Mapping[str, Match],
    conditions: Conditions,
) -> dict:
    """Everything that metrics.json says about the numbers; the command adds paths and provenance."""
    subjects = [pair.subject for pair in pairs]
    networks = describe_networks(tools)
    everyone = np.ones(len(pairs), bool)
    distribution = distances(measured, subjects, everyone, kernel, bootstrap.seed)
    cases = describe_cases(pairs, measured)
    warned = [
        *warn_cases(cases),
        *warn_constant(measured),
        *warn_map(measured, conditions),
        *warn_rescaled(pairs),
        *warn_small(distribution, networks),
        *warn_incomplete(measured),
    ]
    return {
        "schema_version": 1,
        **describe_sizes(pairs, bootstrap),
        "cases": cases,
        "matched_on": {row: match.attributes for row, match in matches.items()},
        "nearest_in": {row: match.nearest for row, match in matches.items()},
        **image_tables(measured, subjects, groups, bootstrap),
        "distribution": distribution,
        "group_distribution": group_distances(measured, subjects, groups, kernel, bootstrap.seed),
        **describe_names(measured, matches),
        "networks": networks,
        "warnings": warned,
        "condition": describe_condition(pairs, conditions),
        "memorization": describe_memorization(pairs, measured),
        "dice_ratio": dice_ratios(measured, subjects, bootstrap),
        "diversity": dict(diversity),
        "axial_axis": tools.axial_axis,
        "spacing": spacing_of(pairs),
        "seed": bootstrap.seed,
        "software": {name: version(name) for name in PACKAGES},
    }


def describe_sizes(pairs: Sequence[Pair], bootstrap: Bootstrap) -> dict:
    """How many images there are of how many subjects, their shape and range, and how means are taken."""
    num_subjects = len(count_subjects(pairs))
    return {
        "n": {
            "images": len(pairs),
            "subjects": num_subjects,
            "samples_per_condition": len(pairs[0].generated),
        },
        "image_shape": list(pairs[0].real.shape),
        "data_range": "images clamped to [-1, 1], mapped to [0, 1]; data range 1",
        "aggregation": "mean over images (a subject counts as often as it has images); "
        f"{bootstrap.level:.0%} percentile bootstrap over {num_subjects} subjects, "
        f"{bootstrap.num_resamples} resamples, seed {bootstrap.seed}",
    }


def image_tables(
    measured: Measured,
    subjects: Sequence[str],
    groups: Mapping[str, Sequence[str | None]],
    bootstrap: Bootstrap,
) -> dict:
    """Means with intervals by row and group, and the differences between `generated` and the other rows."""
    by_group = summarise_groups(measured.values, subjects, groups, bootstrap)
    return {
        "rows": table_dict(summarise(measured.values, subjects, bootstrap)),
        "generated_beside": table_dict(generated_beside(measured, subjects, bootstrap)),
        "differences": table_dict(paired_differences(measured.values, subjects, "generated", bootstrap)),
        "groups": {
            group: {label: table_dict(table) for label, table in tables.items()}
            for group, tables in by_group.items()
        },
    }


def describe_names(measured: Measured, matches: Mapping[str, Match]) -> dict:
    """What every metric and row is, and which metrics are better when higher."""
    names = metric_names_of(measured)
    return {
        "definitions": {name: define(name) for name in names},
        "higher_is_better": [name for name in names if find_metric(name).higher_is_better],
        "row_definitions": {
            **{row: describe_row(row, matches.get(row)) for row in measured.values},
            "real_halves": "half of the real subjects against the other half: what real images score",
            "generated_halves": "generated images of that half of the subjects against the other half's real "
            "ones: to be read beside real_halves, as n and the real images are the same",
        },
    }


def case_columns(
    pairs: Sequence[Pair], measured: Measured, groups: Mapping[str, Sequence[str | None]]
) -> tuple[list[str], list[list]]:
    """Header and lines of per_case.csv, one line for each image and row; `row_n` says on how many images the
    row is.
    """
    metrics = metric_names_of(measured)
    header = ["row", "row_n", "id", "subject", *groups, "slice_index", "num_slices", *metrics]
    lines = []
    for row, values in measured.values.items():
        num = int(measured.present[row].sum())
        for i in np.flatnonzero(measured.present[row]):
            pair = pairs[i]
            numbers = [values[name][i] if name in values else math.nan for name in metrics]
            facts = [members[i] for members in groups.values()]
            place = [pair.attributes.get("slice_index"), pair.attributes.get("num_slices")]
            cells = ["" if math.isnan(number) else f"{number:.8g}" for number in numbers]
            lines.append([row, num, pair.id, pair.subject, *facts, *place, *cells])
    return header, lines
