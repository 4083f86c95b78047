"""Notes to be read with the numbers of an evaluation: other images, small n, conditions, flat images."""

from collections.abc import Iterator, Mapping, Sequence

from medldm.evaluation.conditions import Conditions
from medldm.evaluation.distances import DISTANCES
from medldm.evaluation.measure import Measured
from medldm.evaluation.names import NUM_NAMED, first_names
from medldm.evaluation.pairs import Pair
from medldm.evaluation.tools import entry_of

FRECHET = "Frechet distance, float64, unbiased covariance"
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
        f"{len(names)} {row} images are constant: {first_names(names)}"
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
            if networks[name]["estimator"].endswith(FRECHET) and n <= size and name not in lines:
                kernel = "" if name in DISTANCES else ", and read the kernel distance beside it"
                lines[name] = (
                    f"{name}{'' if row == 'generated' else f' of {row}'}: n = {n} is "
                    f"{'below' if n < size else 'no more than'} the {size} features, so the covariance is "
                    f"singular and the number biased upward; compare only at equal n{kernel}"
                )
    return list(lines.values())


def warn_incomplete(measured: Measured) -> list[str]:
    """One line for every distance in which images take no part, since features of theirs could not be
    taken.
    """
    lines = []
    for network, rows in measured.features.items():
        counts = {row: int(features.isnan().flatten(1).any(1).sum()) for row, features in rows.items()}
        lacking = [f"{num} of {len(rows[row])} {row} images" for row, num in counts.items() if num]
        if lacking:
            lines.append(
                f"{entry_of(network).frechet_name}: {' and '.join(lacking)} take no part: some of their "
                "features could not be taken, as of constant images and of very small ones"
            )
    return lines
