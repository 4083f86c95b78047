"""The metrics of images, one row each: the evaluation, its tables, the report and the README read these."""

import re
from collections.abc import Callable
from typing import NamedTuple

from medldm.metrics.adherence import definition, edge_f1
from medldm.metrics.frechet import frechet_from_features, kernel_distance
from medldm.metrics.image import ImageFunction, mae, nmse_energy, nmse_var, psnr, rmse, ssim_gaussian
from medldm.metrics.manifold import manifold_scores
from medldm.metrics.memorization import nearest_correlation, nearest_distance
from medldm.metrics.overlap import dice
from medldm.metrics.radiomic import radiomic_distance
from medldm.metrics.similarity import ms_ssim, ssim
from medldm.metrics.surface import surface_distances
from medldm.networks.lpips import LPIPS

INCEPTION = "Inception weights"
MEDICALNET = "volumes, MedicalNet weights"
AT_LEAST_ZERO = "0 or more"


class MetricInfo(NamedTuple):
    """What computes a metric, what it is, its unit ("" for none), its range, and what it needs beside images.

    higher_is_better is None where neither end is the better one. in_regions: it can be taken of a part of the
    image too.
    """

    function: Callable
    definition: str
    unit: str
    range: str
    higher_is_better: bool | None
    needs: str = ""
    in_regions: bool = False


# Of an image and its real one, both in [0, 1]: `metrics.image` chooses among these.
IMAGE_METRICS = {
    "ssim": MetricInfo(
        ssim,
        "structural similarity, uniform window 7, sample covariance: scikit-image's default",
        "",
        "-1 to 1",
        True,
    ),
    "ssim_gaussian": MetricInfo(
        ssim_gaussian,
        "structural similarity, Gaussian window 11 along every axis, sigma 1.5, population covariance "
        "(Wang et al. 2004)",
        "",
        "-1 to 1",
        True,
        in_regions=True,
    ),
    "ssim_slices": MetricInfo(
        ssim_gaussian,
        "mean of ssim_gaussian over the axial slices of a volume, windows of 11 x 11",
        "",
        "-1 to 1",
        True,
        "volumes",
    ),
    "nmse_var": MetricInfo(
        nmse_var,
        "mean squared error over the unbiased variance of the real image: 1 for a flat image at its mean, "
        "2 for an independent image",
        "",
        AT_LEAST_ZERO,
        False,
    ),
    "nmse_energy": MetricInfo(
        nmse_energy,
        "sum of squared errors over that of squares of the real image (fastMRI); another than nmse_var",
        "",
        AT_LEAST_ZERO,
        False,
        in_regions=True,
    ),
    "psnr": MetricInfo(
        psnr,
        "10 log10(1 / mean squared error)",
        "dB",
        "any; infinite for equal images",
        True,
        in_regions=True,
    ),
    "rmse": MetricInfo(
        rmse, "root of the mean squared error", "of the range", "0 to 1", False, in_regions=True
    ),
    "mae": MetricInfo(mae, "mean absolute error", "of the range", "0 to 1", False, in_regions=True),
}
# Of an image and what else is known of it.
OTHER_IMAGE_METRICS = {
    "lpips": MetricInfo(
        LPIPS,
        "learned perceptual distance (Zhang et al. 2018); lpips_slices is its mean over a volume's slices",
        "",
        AT_LEAST_ZERO,
        False,
        "AlexNet or VGG16 weights",
    ),
    "edge_f1": MetricInfo(
        edge_f1,
        "F1 of edges detected again on the image (the data set's recipe) against the conditioning edges, "
        "matched within 1, 2, ... px (Chebyshev): edge_f1_1px, edge_f1_2px",
        "",
        "0 to 1",
        True,
        "conditioning edges",
    ),
    "edge_f1_real": MetricInfo(
        edge_f1,
        "the same against the edges of the real image, where the image was made without edges",
        "",
        "0 to 1",
        True,
        "edges of the real image",
    ),
    "dice": MetricInfo(
        dice,
        "Dice of a class (dice_CLASS), or its mean over the foreground classes that either map has "
        "(dice_mean): the map that the segmenter finds against the map asked for",
        "",
        "0 to 1",
        True,
        "class maps, a segmenter",
    ),
    "hd95": MetricInfo(
        surface_distances,
        "95th percentile of the Hausdorff distance between the surfaces of a class (hd95_CLASS), or its mean "
        "over the classes (hd95_mean), in the same two maps; the image's diagonal where one map lacks the "
        "class",
        "mm; voxels where the spacing is not known",
        AT_LEAST_ZERO,
        False,
        "class maps, a segmenter",
    ),
    "surface_distance": MetricInfo(
        surface_distances,
        "mean distance between the surfaces of a class (surface_distance_CLASS, surface_distance_mean), "
        "taken over both; the image's diagonal where one map lacks the class",
        "mm; voxels where the spacing is not known",
        AT_LEAST_ZERO,
        False,
        "class maps, a segmenter",
    ),
    "nearest_train_rmse": MetricInfo(
        nearest_distance,
        "RMSE of the thumbnail to that of the nearest training image; clearly below the row `real` means "
        "repeated training images",
        "of the range",
        "0 to 1",
        None,
        "training images",
    ),
    "nearest_train_correlation": MetricInfo(
        nearest_correlation,
        "highest correlation with the thumbnail of a training image, over mirrorings and shifts of up to one "
        "of its pixels, half pixels among them",
        "",
        "-1 to 1",
        None,
        "training images",
    ),
    "nearest_train_perceptual": MetricInfo(
        nearest_distance,
        "least squared distance, over mirrorings, to the LPIPS features of a training image, averaged over "
        "space (of volumes over their axial slices too): at most LPIPS",
        "",
        AT_LEAST_ZERO,
        None,
        "training images, AlexNet or VGG16 weights",
    ),
    "nearest_train_inception": MetricInfo(
        nearest_distance,
        "least squared distance of Inception's pool3 features, each of length 1 (of volumes their mean over "
        "axial slices), to those of a training image: 2 less twice the cosine",
        "",
        "0 to 2",
        None,
        f"training images, {INCEPTION}",
    ),
    "diversity_rmse": MetricInfo(
        rmse,
        "mean pairwise RMSE between the K samples of a condition",
        "of the range",
        "0 to 1",
        None,
        "K samples",
    ),
    "ms_ssim": MetricInfo(
        ms_ssim,
        "multi-scale structural similarity (Wang et al. 2003) between random images of one set; that of real "
        "images is the aim",
        "",
        "0 to 1",
        None,
    ),
}
# Of a set of images and the set of real ones.
SET_METRICS = {
    "fid": MetricInfo(
        frechet_from_features,
        "Frechet distance of Inception's 2048 pool3 features (Heusel et al. 2017); fid_64, fid_192, fid_768 "
        "of earlier layers are other numbers",
        "",
        AT_LEAST_ZERO,
        False,
        INCEPTION,
    ),
    "kid": MetricInfo(
        kernel_distance,
        "unbiased squared MMD of the same features, kernel (x.y / D + 1)^3 (Binkowski et al. 2018)",
        "",
        "0 in the mean for equal distributions, may be negative",
        False,
        INCEPTION,
    ),
    "precision": MetricInfo(
        manifold_scores,
        "share of the images within the 3-neighbour manifold of the real ones (Kynkaanniemi et al. 2019)",
        "",
        "0 to 1",
        True,
        INCEPTION,
    ),
    "recall": MetricInfo(
        manifold_scores,
        "share of the real images within the 3-neighbour manifold of the images",
        "",
        "0 to 1",
        True,
        INCEPTION,
    ),
    "density": MetricInfo(
        manifold_scores,
        "in how many 5-neighbour balls of real images an image lies, over 5 (Naeem et al. 2020)",
        "",
        "0 or more; 1 in the mean for equal distributions",
        True,
        INCEPTION,
    ),
    "coverage": MetricInfo(
        manifold_scores,
        "share of the real images whose 5-neighbour ball holds an image (Naeem et al. 2020)",
        "",
        "0 to 1",
        True,
        INCEPTION,
    ),
    "fid_3d": MetricInfo(
        frechet_from_features,
        "Frechet distance of the averaged last maps of MedicalNet's ResNet-50",
        "",
        AT_LEAST_ZERO,
        False,
        MEDICALNET,
    ),
    "kid_3d": MetricInfo(
        kernel_distance, "unbiased squared MMD of the same features", "", "as kid", False, MEDICALNET
    ),
    "frd": MetricInfo(
        radiomic_distance,
        "Frechet radiomic distance, version 1 (Konz et al. 2026): log of the Frechet distance of "
        "pyradiomics' features (398 in 2D, 1,014 in 3D), standardised by the real images; add it by "
        "metrics.features=[radiomics]",
        "",
        "any",
        False,
        "pyradiomics",
    ),
    "frechet_random_conv": MetricInfo(
        frechet_from_features,
        "Frechet distance of features of a fixed random network; not FID, compares runs on one data set",
        "",
        AT_LEAST_ZERO,
        False,
    ),
    "kernel_random_conv": MetricInfo(
        kernel_distance, "unbiased squared MMD of the same features", "", "as kid", False
    ),
}
METRICS = IMAGE_METRICS | OTHER_IMAGE_METRICS | SET_METRICS
# Parts of an image in which the metrics that are defined in one are taken too, as <metric>_<region>.
REGIONS = {
    "brain": "where the source is not background",
    "tumour": "where the map of the target is not 0; left out where there is none",
}
# What is taken of every class, as <name>_<class>, and over them, as <name>_mean.
OF_CLASSES = {
    "dice": "Dice",
    "hd95": "95th percentile of the Hausdorff distance",
    "surface_distance": "mean surface distance",
}
REGIONAL = [name for name, row in IMAGE_METRICS.items() if row.in_regions]
# Names that belong to a row under another name; the first group, where there is one, is the row's.
FAMILIES = {
    r"edge_f1_real_\d+px": "edge_f1_real",
    r"edge_f1_\d+px": "edge_f1",
    **{f"{name}_.+": name for name in OF_CLASSES},
    r"(lpips)_slices": None,
    r"(fid|kid)(?:_64|_192|_768)?(?:_slices)?": None,
    r"(precision|recall|density|coverage)(?:_3d|_random_conv)?(?:_slices)?": None,
    rf"({'|'.join(REGIONAL)})_(?:{'|'.join(REGIONS)})": None,
}


def find_metric(name: str) -> MetricInfo:
    """The row of a name in a table of results, families (`dice_liver`, `psnr_brain`) included.

    Raises KeyError for a name that is none: a direction is never guessed.
    """
    if name in METRICS:
        return METRICS[name]
    for pattern, row in FAMILIES.items():
        if found := re.fullmatch(pattern, name):
            return METRICS[row or found[1]]
    raise KeyError(f"{name}: no metric of this name; metrics/catalogue.py has a row for each")


def define(name: str) -> str:
    """What the number of this name is, with the tolerance, class or region that the name states."""
    text, (*_, last) = find_metric(name).definition, name.rpartition("_")
    if name.startswith("edge_f1_"):
        against = "the edges of the real image" if "_real_" in name else "the conditioning edges"
        return definition(int(last.removesuffix("px")), against)
    for family, what in OF_CLASSES.items():
        if name.startswith(f"{family}_") and name != f"{family}_mean":
            whose = name.removeprefix(f"{family}_")
            return f"{what} of {whose}: map found by the segmenter against the map asked for"
    return f"{text}; {REGIONS[last]}" if last in REGIONS else text


def better(name: str) -> str:
    """'higher', 'lower', or 'as real' where neither end is the better one."""
    return {True: "higher", False: "lower", None: "as real"}[find_metric(name).higher_is_better]


def select_metrics(names: list[str]) -> dict[str, ImageFunction]:
    """The functions of these names; ValueError for a name that does not exist."""
    unknown = [name for name in names if name not in IMAGE_METRICS]
    if unknown:
        raise ValueError(f"no metric {unknown[0]!r}; choose from {', '.join(IMAGE_METRICS)}")
    return {name: IMAGE_METRICS[name].function for name in names}


def markdown_table() -> str:
    """All rows as README.md shows them."""
    lines = ["| metric | definition | unit, range | better | needs |", "|---|---|---|---|---|"]
    for name, row in METRICS.items():
        cells = [
            f"`{name}`",
            row.definition,
            ", ".join(filter(None, (row.unit, row.range))),
            better(name),
            row.needs,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
