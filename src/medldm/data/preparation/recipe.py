"""What decides how a raw file is prepared: a recipe made of plain config values, and its hash."""

import importlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from medldm.bounds import check_number
from medldm.data.preparation.edges import EdgeRecipe
from medldm.data.preparation.intensity import INVERSIONS, Intensity
from medldm.data.preparation.labels import NUM_STORABLE, Labels
from medldm.data.preparation.resize import Resize
from medldm.errors import InputError
from medldm.fingerprints import digest
from medldm.schemas import Preprocess, check_setting

SCHEMA_VERSION = 1
FROM_BACKGROUND = (
    "background"  # of `foreground_above`: whatever differs from the value that all corners share
)
DTYPES = ("float16", "float32")
COMPRESSION: dict[str, dict] = {
    "none": {},
    "lzf": {"compression": "lzf", "shuffle": True},
    "gzip": {"compression": "gzip", "compression_opts": 4, "shuffle": True},
}
BEFORE = {"slice_orientation": "stored"}  # what folders were prepared with that do not say it
RECIPE_CHOICES: dict[str, tuple] = {
    "dtype": DTYPES,
    "compression": tuple(COMPRESSION),
    "slice_axis": (0, 1, 2),
    "slice_orientation": ("body", "stored"),
    "invert": INVERSIONS,
    "interpolation": ("linear", "bspline"),
    "mask_grid": ("same", "resample", "trust"),
}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a prepared file holds, apart from the raw files."""

    spatial_dims: int
    image_size: tuple[int | None, ...] | None
    resize: Resize
    intensity: Intensity
    labels: Labels
    edges: EdgeRecipe | None
    dtype: str
    compression: str
    slice_axis: int
    slice_orientation: str
    crop_label_margin: float | None
    orientation: str
    spacing: tuple[float, ...] | None
    crop_foreground: bool
    divisible_by: int
    invert: str
    in_plane_size: int | None
    min_size: tuple[int, ...] | None
    interpolation: str
    foreground_above: float | str | None
    remove_artifacts: bool
    mask_out: bool
    mask_grid: str

    def as_dict(self) -> dict:
        return json.loads(json.dumps(asdict(self)))

    @property
    def hash(self) -> str:
        """A digest of the parameters, and of the versions of the libraries that do the work."""
        libraries = (
            ("numpy", "cv2", "scipy") if self.spatial_dims == 2 else ("numpy", "nibabel", "monai", "torch")
        )
        versions = {name: importlib.import_module(name).__version__ for name in ("medldm", *libraries)}
        content = {"schema": SCHEMA_VERSION, "recipe": self.as_dict(), "libraries": versions}
        if self.min_size is not None:  # files made before this key had its effect are made anew
            content["padded to min_size"] = True
        return digest(content)


def make_recipe(
    spatial_dims: int, image_size: int | Sequence[int | None] | None, preprocess: Mapping[str, Any]
) -> Recipe:
    """From plain config values. InputError names the key that makes no sense. 2D without a size means 256."""
    if spatial_dims not in (2, 3):
        raise InputError(f"data.spatial_dims={spatial_dims}: choose 2 or 3")
    if image_size is None and spatial_dims == 2:
        image_size = 256
    check_setting(preprocess, Preprocess, "data.preprocess")
    size = grid_size(image_size, spatial_dims)
    options = dict(preprocess)
    for key, choices in RECIPE_CHOICES.items():
        if options[key] not in choices:
            raise InputError(
                f"data.preprocess.{key}={options[key]}: choose from {', '.join(map(str, choices))}"
            )
    check_orientation(options["orientation"])
    above = options["foreground_above"]
    if isinstance(above, str) and above != FROM_BACKGROUND:
        raise InputError(
            f"data.preprocess.foreground_above={above}: give a number, null or {FROM_BACKGROUND}"
        )
    margin = options["crop_label_margin"]
    if margin is not None and (margin < 0 or spatial_dims != 2):
        raise InputError(f"data.preprocess.crop_label_margin={margin}: give a share of at least 0, in 2D")
    intensity, labels = dict(options.pop("intensity")), dict(options.pop("labels") or {})
    for key in ("percentiles", "window"):
        if intensity.get(key) is not None:
            intensity[key] = tuple(intensity[key])
    edges, spacing, least = options.pop("edges"), options.pop("spacing"), options.pop("min_size")
    least = check_min_size(least, spatial_dims)
    if edges is not None and edges.get("thresholds") is not None:
        edges = {**edges, "thresholds": tuple(edges["thresholds"])}
    mapping = labels.get("mapping")
    return Recipe(
        spatial_dims=spatial_dims,
        image_size=size,
        resize=built(Resize, options.pop("resize"), "resize"),
        intensity=built(Intensity, intensity, "intensity"),
        labels=Labels(
            numbered_names(labels.get("names")),
            {int(k): int(v) for k, v in mapping.items()} if mapping else None,
        ),
        edges=built(EdgeRecipe, edges, "edges") if edges is not None and spatial_dims == 2 else None,
        min_size=least,
        spacing=tuple(spacing) if isinstance(spacing, Iterable) else spacing and (float(spacing),) * 3,
        **options,
    )


def built(part: Callable, options: Mapping[str, Any], key: str) -> Any:
    """A part of a recipe. InputError that names an option which it has not."""
    unknown = options.keys() - {field.name for field in fields(part)}
    if unknown:
        raise InputError(
            f"no key data.preprocess.{key}.{min(map(str, unknown))}; see configs/data/common.yaml"
        )
    return part(**options)


def numbered_names(names: int | Sequence[str] | None) -> tuple[str, ...] | None:
    """A number stands for classes whose names are not published."""
    if isinstance(names, int | float):
        check_number("data.preprocess.labels.names", names, 1, NUM_STORABLE, whole=True)
        return ("background", *(f"class {i}" for i in range(1, names)))
    return tuple(names) if names else None


def grid_size(given: Any, spatial_dims: int) -> tuple[int | None, ...] | None:
    """`data.image_size` by axis."""
    if isinstance(given, str | bool) or not isinstance(given, int | Sequence | None):
        raise InputError(f"data.image_size={given}: give one number, or {spatial_dims} of them")
    size = (given,) * spatial_dims if isinstance(given, int) else given and tuple(given)
    check_grid_size(given, size, spatial_dims)
    return size


def check_grid_size(
    given: Any, size: Sequence[int | None] | None, spatial_dims: int, key: str = "image_size"
) -> None:
    """A 3D size may leave an axis open (null); a 2D one may not."""
    if size is None:
        return
    numbers = [n for n in size if n is not None or spatial_dims == 2]
    if len(size) != spatial_dims or any(not isinstance(n, int) or not 8 <= n < 2**17 for n in numbers):
        raise InputError(f"data.{key}={given}: give one number, or {spatial_dims} of them, of at least 8")


def check_min_size(given: int | Sequence[int | None] | None, spatial_dims: int) -> tuple | None:
    """`preprocess.min_size` by axis. InputError in 2D, where every slice gets `image_size` and it would do
    nothing.
    """
    if given is None:
        return None
    if spatial_dims == 2:
        raise InputError(
            f"data.preprocess.min_size={given}: pads volumes; set it to null, slices have data.image_size"
        )
    least = (given,) * spatial_dims if isinstance(given, int) else tuple(given)
    check_grid_size(given, least, spatial_dims, "preprocess.min_size")
    return least


def check_orientation(code: str) -> None:
    if len(code) != 3 or any(len(set(code) & set(pair)) != 1 for pair in ("RL", "AP", "SI")):
        raise InputError(
            f"data.preprocess.orientation={code}: give one letter each of RL, AP and SI, for instance SPL"
        )


def recipe_of(index: Mapping[str, Any]) -> Recipe:
    """The recipe that a prepared folder was made with, from its index: to prepare one more file alike."""
    preprocess = {**BEFORE, **index["preprocess"]}
    missing = {field.name for field in fields(Recipe)} - preprocess.keys()
    if missing:
        raise InputError(
            f"index.json: lacks preprocess.{min(missing)}, which is newer; prepare the data again"
        )
    return make_recipe(preprocess.pop("spatial_dims"), preprocess.pop("image_size"), preprocess)
