"""The content of metrics.json and per_case.csv: numbers with n, range, implementation, networks, seeds."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from medldm.evaluation.baselines import Match, describe_row
from medldm.evaluation.conditions import Conditions
from medldm.evaluation.measure import Measured, Tools, distances, entry_of
from medldm.evaluation.pairs import Pair, count_subjects
from medldm.evaluation.regions import REGIONS
from medldm.metrics.adherence import definition
from medldm.metrics.image import DEFINITIONS, is_higher_better
from medldm.metrics.memorization import memorized_share
from medldm.metrics.summary import Bootstrap, Table, paired_differences, select, summarise, summarise_groups

PACKAGES = ("torch", "torchmetrics", "scikit-image", "torch-fidelity", "numpy", "opencv-python-headless")
NUM_NAMED = 3  # images named in a line
FRECHET = "Frechet distance, float64, unbiased covariance"
KERNEL = "unbiased MMD^2, polynomial kernel (x.y / D + 1)^3"
NEAR = 0.05  # of the real held-out images are as near to a training image as this share says
DIFFERENT = "the edges differ from those of the test images (degraded or drawn)"
NOT_GIVEN = (
    "the images were drawn without edges: edge_f1_real compares with the edges of the real image, which the "
    "model did not see"
)
NOT_RECORDED = (
    "whether the images were made from edges is not recorded: edge_f1_real compares with the edges of the "
    "real image"
)
UNKNOWN_EDGES = "no conditioning edges are stored with these images"
FROM_REAL = (
    "the edges come from the very test image: paired metrics then measure how well the image is rebuilt from "
    "its own outlines, not synthesis from a drawing"
)


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
    """On how many images of how many subjects each row is, and which it lacks. `fingerprint` is that of the
    names of all images: two evaluations of the same fingerprint are on the same ones.
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


def warn_cases(cases: Mapping) -> list[str]:
    """One line for every row that is on other images than `generated`."""
    num = cases["rows"]["generated"]["n"]
    return [
        f"{row} is on {facts['n']} of {num} images (of {facts['num_subjects']} subjects; it lacks "
        f"{', '.join(facts['without'])}{', ...' if num - facts['n'] > NUM_NAMED else ''}): do not compare it "
        "with rows on all images, but with `generated` on the same ones"
        for row, facts in cases["rows"].items()
        if not facts["same_as_generated"]
    ]


def warn_constant(measured: Measured) -> list[str]:
    return [
        f"{len(names)} {row} images are constant: {', '.join(names[:NUM_NAMED])}"
        + (", ..." if len(names) > NUM_NAMED else "")
        for row, names in measured.constant.items()
        if names
    ]


def describe_condition(pairs: Sequence[Pair], conditions: Conditions) -> dict:
    """What the images were made from, and whether conditioning edges are those of the test images: paired
    numbers then mean less. `edges_from_test_image` is None where nothing is known of edges.
    """
    lines = list(describe_conditions(conditions))
    known = [pair.edges_from_real for pair in pairs if pair.edges_from_real is not None]
    share, note = None, UNKNOWN_EDGES
    if known:
        share = sum(known) / len(known)
        note = FROM_REAL if share else DIFFERENT
        if 0 < share < 1:
            note = f"of {sum(known)} of {len(known)} images {FROM_REAL}"
    elif any(pair.real_edges is not None for pair in pairs):
        share = None if conditions.given("edges") is None else 0.0
        note = NOT_RECORDED if share is None else NOT_GIVEN
    if note != UNKNOWN_EDGES:
        lines.append(note)
    return {"edges_from_test_image": share, "note": note, "lines": lines, **conditions.as_dict()}


def describe_conditions(conditions: Conditions) -> Iterator[str]:
    """One line on what the model was told, one on what was withheld."""
    if conditions.arrays is not None:
        level = conditions.edge_level
        names = [
            f"edges (edge_level {level})" if name == "edges" and level is not None else name
            for name in (*conditions.arrays, *(conditions.attributes or ()))
        ]
        yield f"the model takes {', '.join(names) or 'no condition'}"
    if conditions.dropped:
        yield f"{', '.join(conditions.dropped)} withheld when the images were drawn"


def warn_map(measured: Measured, conditions: Conditions) -> list[str]:
    """One line where Dice compares with a map that the images were not made from."""
    has_dice = any(name.startswith("dice_") for name in measured.values["generated"])
    if not has_dice or conditions.given("mask") is not False:
        return []
    return ["dice: the images were drawn without the map; it compares with the map of the real image"]


def describe_networks(tools: Tools) -> dict:
    """Every distribution metric by name: its network and hash, or why it is missing."""
    out: dict[str, dict] = {}
    for key, network in tools.networks.items():
        for name, size in tools.feature_sizes(key).items():
            entry = entry_of(name)
            facts = {"network": entry.description, "sha256": network.sha256, "num_features": size}
            out[entry.frechet_name] = facts | {"estimator": "Frechet distance, float64, unbiased covariance"}
            out[entry.kernel_name] = facts | {
                "estimator": "unbiased MMD^2, polynomial kernel (x.y / D + 1)^3"
            }
    if tools.lpips is not None:
        out[tools.lpips_name] = {"network": "LPIPS on [-1, 1], grey repeated", "sha256": tools.lpips.sha256}
    return out | {name: {"missing": why} for name, why in tools.missing.items()}


def warn_rescaled(pairs: Sequence[Pair]) -> list[str]:
    """One line where values had to be brought into range: paired numbers then depend on how."""
    num = sum(bool(pair.attributes.get("rescaled")) for pair in pairs)
    return [
        f"{num} real images are in raw units: each one's own 0.5 and 99.5 percentiles became -1 and 1, for "
        "what is generated for it too"
    ][: bool(num)]


def warn_small(distribution: Mapping[str, dict], networks: Mapping[str, dict]) -> list[str]:
    """One line for every Frechet distance of which a row has no more images than features: the covariance of
    n images has rank n - 1 at most.
    """
    lines: dict[str, str] = {}
    for row, scores in distribution.items():
        for name, score in scores.items():
            size, n = networks[name]["num_features"], min(score["n"], score["n_reference"])
            if networks[name]["estimator"] == FRECHET and n <= size and name not in lines:
                lines[name] = (
                    f"{name}{'' if row == 'generated' else f' of {row}'}: n = {n} is "
                    f"{'below' if n < size else 'no more than'} the {size} features, so the covariance is "
                    "singular and the number biased upward; compare only at equal n, and read the kernel "
                    "distance beside it"
                )
    return list(lines.values())


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


def describe_memorization(measured: Measured) -> dict:
    """How many generated images lie suspiciously near to a training image; {} without training images."""
    made, real = (measured.values.get(row, {}).get("nearest_train_rmse") for row in ("generated", "real"))
    if made is None or real is None:
        return {}
    made, real = (values[~np.isnan(values)] for values in (made, real))
    if not len(made) or not len(real):
        return {}
    share = memorized_share(made, real, NEAR)
    return {"memorized_share": share, "quantile": NEAR, "n": len(made), "n_real": len(real)}


def spacing_of(pairs: Sequence[Pair]) -> object:
    """The voxel size in mm where all volumes have the same."""
    found = {tuple(np.round(np.ravel(s), 4)) for p in pairs if (s := p.attributes.get("spacing")) is not None}
    return list(found.pop()) if len(found) == 1 else None


def definitions(measured: Measured) -> dict[str, str]:
    names = dict.fromkeys(name for metrics in measured.values.values() for name in metrics)
    known = {
        **DEFINITIONS,
        "lpips": "LPIPS, lower is closer",
        "lpips_slices": "mean of LPIPS over the axial slices of a volume, lower is closer",
        "dice_mean": "mean of the Dice of the foreground classes that an image or its segmentation has",
        "nearest_train_rmse": "RMSE on [0, 1] of the thumbnail to that of the nearest training image; "
        "clearly below the row `real` means repeated training images",
        "diversity_rmse": "mean pairwise RMSE on [0, 1] between the K samples of a condition",
        **{f"edge_f1_{t}px": definition(t) for t in range(1, 10)},
        **{f"edge_f1_real_{t}px": definition(t, "the edges of the real image") for t in range(1, 10)},
    }
    for name in [name for name in names if name.rpartition("_")[2] in REGIONS]:
        metric, _, region = name.rpartition("_")
        known[name] = f"{known.get(metric, metric)}; {REGIONS[region]}"
    return {name: known.get(name) or class_definition(name) for name in names}


def class_definition(name: str) -> str:
    """Of `dice_<class>`."""
    label = name.removeprefix("dice_")
    return f"Dice of {label}: map found by the segmenter against the map asked for" if label != name else ""


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
    num_subjects = len(count_subjects(pairs))
    cases = describe_cases(pairs, measured)
    return {
        "schema_version": 1,
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
        "cases": cases,
        "matched_on": {row: match.attributes for row, match in matches.items()},
        "rows": table_dict(summarise(measured.values, subjects, bootstrap)),
        "generated_beside": table_dict(generated_beside(measured, subjects, bootstrap)),
        "distribution": distribution,
        "differences": table_dict(paired_differences(measured.values, subjects, "generated", bootstrap)),
        "groups": {
            group: {label: table_dict(table) for label, table in tables.items()}
            for group, tables in summarise_groups(measured.values, subjects, groups, bootstrap).items()
        },
        "group_distribution": group_distances(measured, subjects, groups, kernel, bootstrap.seed),
        "definitions": definitions(measured),
        "higher_is_better": [name for name in definitions(measured) if is_higher_better(name)],
        "row_definitions": {
            **{row: describe_row(row, matches.get(row)) for row in measured.values},
            "real_halves": "half of the real subjects against the other half: what real images score",
        },
        "networks": networks,
        "warnings": [
            *warn_cases(cases),
            *warn_constant(measured),
            *warn_map(measured, conditions),
            *warn_rescaled(pairs),
            *warn_small(distribution, networks),
        ],
        "condition": describe_condition(pairs, conditions),
        "memorization": describe_memorization(measured),
        "dice_ratio": dice_ratios(measured, subjects, bootstrap),
        "diversity": dict(diversity),
        "axial_axis": tools.axial_axis,
        "spacing": spacing_of(pairs),
        "seed": bootstrap.seed,
        "software": {name: version(name) for name in PACKAGES},
    }


def case_columns(
    pairs: Sequence[Pair], measured: Measured, groups: Mapping[str, Sequence[str | None]]
) -> tuple[list[str], list[list]]:
    """Header and lines of per_case.csv: one line an image and row, `row_n` being the images of that row."""
    metrics = list(definitions(measured))
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
