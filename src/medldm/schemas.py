"""Schemas of the JSON files of medldm, which are checked whenever one is read: anyone may have changed it.

A schema states what the program relies on. Further entries are allowed, and the content stays as it was read.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from medldm.errors import InputError
from medldm.files import leads_out, read_json

TABLES_OF = {"view": "view_names", "phase": "phase_names", "label": "label_values"}


def one_name(name: str) -> str:
    """The name of a file without a folder, and not too long for a file system. ValueError for
    another text.
    """
    if leads_out(name) or "/" in name or "\\" in name or len(name.encode()) > 250:
        raise ValueError(f"{name!r:.80} is not the name of a file")
    return name


def file_below(name: str) -> str:
    if leads_out(name):
        raise ValueError(f"{name!r:.80} leads out of the folder")
    return name


Name = Annotated[str, AfterValidator(one_name)]
FileBelow = Annotated[str, AfterValidator(file_below)]
Length = Annotated[int, Field(ge=1, le=2**31)]
Count = Annotated[int, Field(ge=0, le=2**31)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Numbers3 = Annotated[list[Finite], Field(min_length=3, max_length=3)]
AffineRows = Annotated[list[Annotated[list[Finite], Field(min_length=4, max_length=4)]], Field(min_length=4)]
Text = str | int | float | bool | None


class Schema(BaseModel):
    """A schema whose entries must be of their types. Other entries may stand beside them."""

    model_config = ConfigDict(extra="allow", strict=True)


class RawFile(Schema):
    """A raw file that a case was made from."""

    key: str | None = None
    dataset: str | None = None
    path: str | None = None
    sha256: str | None = None


class CaseEntry(Schema):
    """The entry of a prepared file, which holds all slices of a subject in 2D, or a volume in 3D."""

    id: Name
    subject: str
    file: FileBelow
    file_size: Count | None = None
    attributes: dict[str, Text] | None = None
    slices: dict[str, list] = {}
    num_slices: Length | None = None
    shape: list[Length] | None = None
    spacing: list[Finite] | None = None
    affine: AffineRows | None = None
    intensity_range: Annotated[list[Finite], Field(min_length=2, max_length=2)] | None = None
    content: dict[str, str] | None = None
    fingerprint: str | None = None
    preprocess_hash: str | None = None
    raw: list[RawFile] = []
    view: int = -1
    phase: int = -1
    label: int = -1
    labels: list[Count] = []
    max_class: Count | None = None
    classes: list[Count] = []

    @model_validator(mode="after")
    def has_equal_columns(self) -> "CaseEntry":
        wrong = [name for name, column in self.slices.items() if len(column) != self.num_slices]
        if wrong:
            raise ValueError(f"its column {wrong[0]} does not have num_slices entries")
        places = [*self.slices.get("slice_index", ()), *self.slices.get("num_slices", ())]
        if not all(isinstance(place, int) for place in places):
            raise ValueError("its columns slice_index and num_slices are not whole numbers")
        return self


class AttributeEntry(Schema):
    """An attribute that index.json declares: a number with its range, or names."""

    kind: Literal["scalar", "categorical"]
    range: Annotated[list[Finite], Field(min_length=2, max_length=2)] = [0.0, 1.0]
    names: list[Text] = []

    @model_validator(mode="after")
    def states_its_values(self) -> "AttributeEntry":
        needed = "range" if self.kind == "scalar" else "names"
        if needed not in self.model_fields_set:
            raise ValueError(f"a {self.kind} attribute needs its {needed}")
        return self


class Index(Schema):
    """The content of index.json."""

    schema_version: Literal[1]
    dataset: str
    spatial_dims: Literal[2, 3]
    image_channels: Annotated[int, Field(ge=1, le=16)] = 1
    num_classes: Annotated[int, Field(ge=1, le=2**16)] | None = None
    label_names: list[Text] | None = None
    view_names: list[Text] | None = None
    phase_names: list[Text] | None = None
    label_values: list[Text] | None = None
    num_views: Count = 0
    num_phases: Count = 0
    num_labels: Count = 0
    num_edge_levels: Count = 0
    multi_label: bool | None = False
    has_images: bool = True
    has_edges: bool = False
    attributes: dict[str, AttributeEntry] | None = None
    image_size: list[Length] | None = None
    orientation: Annotated[str, Field(pattern="^[RLAPSI]{3}$")] | None = None
    preprocess: dict[str, Any] | None = None
    raw: str | None = None
    inventory: dict[str, Any] = {}
    cases: Annotated[list[CaseEntry], Field(min_length=1)]
    cine: list[CaseEntry] = []

    @model_validator(mode="after")
    def fits_together(self) -> "Index":
        seen: set[str] = set()
        for case in [*self.cases, *self.cine]:
            if case.id in seen:
                raise ValueError(f"the case {case.id} is listed twice")
            seen.add(case.id)
            if self.spatial_dims == 2 and case.num_slices is None:
                raise ValueError(f"the case {case.id} states no num_slices")
            for kind, table in TABLES_OF.items():
                self.check_numbers(case, kind, getattr(self, table))
        return self

    def check_numbers(self, case: CaseEntry, kind: str, names: list | None) -> None:
        """ValueError where a case has the number of a view, phase or label that has no name."""
        count = max(len(names or ()), getattr(self, f"num_{kind}s"))
        numbers = [*case.slices.get(kind, ()), getattr(case, kind)]
        if not all(isinstance(n, int) and -1 <= n < max(count, 1) for n in numbers):
            raise ValueError(f"the case {case.id} has a {kind} beyond the {count} that are named")


# ---- data.preprocess, in a config or as index.json keeps it ----

TwoNumbers = Annotated[Sequence[Finite], Field(min_length=2, max_length=2)]
Millimetres = Annotated[float, Field(gt=0, le=1e4, allow_inf_nan=False)]
Voxels = Annotated[int, Field(ge=1, le=2**17)]


class ResizeValues(Schema):
    """The settings of data.preprocess.resize."""

    mode: str
    spacing: Millimetres = 1.0
    antialias: bool = True
    clip_overshoot: bool = True


class IntensityValues(Schema):
    """The settings of data.preprocess.intensity."""

    mode: str
    percentiles: TwoNumbers = (0.5, 99.5)
    window: TwoNumbers | None = None
    region: str = "volume"
    clip: bool = True


class LabelValues(Schema):
    """The settings of data.preprocess.labels."""

    names: int | float | Sequence[Text] | None = None
    mapping: dict[int | Annotated[str, Field(pattern=r"^-?\d{1,9}$")], int] | None = None


class EdgeValues(Schema):
    """The settings of data.preprocess.edges."""

    source: str = "image"
    l2_gradient: bool = False
    body_mask: bool = False
    thresholds: TwoNumbers | None = None
    per_view: dict[str, dict[str, Any]] = {}
    levels: Any = ()


class Preprocess(Schema):
    """The types of the settings. `preparation.recipe` checks how they go together."""

    resize: ResizeValues
    intensity: IntensityValues
    labels: LabelValues | None = None
    edges: EdgeValues | None = None
    orientation: str
    spacing: Millimetres | Annotated[Sequence[Millimetres], Field(min_length=3, max_length=3)] | None = None
    crop_label_margin: Finite | None = None
    crop_foreground: bool
    divisible_by: Annotated[int, Field(ge=1, le=4096)]
    in_plane_size: Voxels | None = None
    min_size: int | Sequence[int | None] | None = None
    foreground_above: Finite | str | None = None
    remove_artifacts: bool
    mask_out: bool


class SubjectFile(Schema):
    """A file of one subject, as ldm-medical-image lists it."""

    file_name: Name | None = None
    num_samples: Length


class SubjectFiles(Schema):
    """The content of dataset_index_mapping.json of ldm-medical-image: files by subject."""

    __pydantic_extra__: dict[Name, SubjectFile]


class SplitEntry(Schema):
    """One split: lists of subjects, and a note on its origin."""

    model_config = ConfigDict(extra="forbid", strict=True)
    train: list[str] = []
    val: list[str] = []
    test: list[str] = []
    note: str = ""


class Splits(Schema):
    """The content of splits.json: splits by name."""

    __pydantic_extra__: dict[str, SplitEntry]


class Provenance(Schema):
    """The content of provenance.json of `medldm sample`, `translate` or `export`."""

    checkpoint: str | None = None
    checkpoint_sha256: str | None = None
    data_root: str | None = None
    data_split: str | None = None
    split: str | None = None
    training_subjects: list[str] = []
    unrecorded_stages: list[str] = []
    condition: list[str] | None = None
    attributes: list[str] = []
    dropped: list[str] = []
    cases: str | dict[str, dict[str, str]] | None = None
    images: dict[str, dict[str, Any]] = {}


class Latents(Schema):
    """The content of latents.json."""

    checkpoint: str | None = None
    checkpoint_sha256: str | None = None
    encoder_sha256: str | None = None
    downsampling: Annotated[list[Length], Field(min_length=2, max_length=3)] | None = None
    cases: dict[str, str | None] | None = None


class Score(Schema):
    """A mean with its interval, and the images and subjects that it is of."""

    mean: float | None = None
    ci95: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    n: Count
    num_subjects: Count


class RowSize(Schema):
    """How many images a row of an evaluation is of, and whether they are those of `generated`."""

    n: Count
    num_subjects: Count
    same_as_generated: bool


class Sizes(Schema):
    """How many images of how many subjects an evaluation is of."""

    images: Count
    subjects: Count


class Cases(Schema):
    """The images of an evaluation: their digest, and the sizes of its rows."""

    fingerprint: str | None = None
    rows: dict[str, RowSize] = {}


Scores = dict[str, Score]  # by metric
ScoreTable = dict[str, dict[str, dict[str, Any]]]  # by row and metric


class Metrics(Schema):
    """The content of metrics.json."""

    schema_version: Literal[1]
    n: Sizes
    aggregation: str
    data_range: str
    cases: Cases = Cases()
    rows: dict[str, Scores]
    metrics: dict[str, Any]
    definitions: dict[str, str | dict[str, Any]]
    distribution: ScoreTable
    groups: dict[str, dict[str, dict[str, Scores]]]
    group_distribution: dict[str, dict[str, ScoreTable]] = {}
    differences: ScoreTable
    generated_beside: dict[str, dict[str, Any]] = {}
    matched_on: dict[str, list[str]] = {}
    nearest_in: dict[str, list[str]] = {}
    row_definitions: dict[str, str]
    higher_is_better: list[str] = []
    networks: dict[str, dict[str, Any] | None]
    condition: dict[str, Any]
    memorization: dict[str, Any]
    diversity: dict[str, Any] = {}
    dice_ratio: dict[str, Any] = {}
    software: dict[str, Any] = {}
    image_shape: list[Length] | None = None
    axial_axis: int | None = None
    warnings: list[str]
    folders: dict[str, str | None] = {}
    provenance: dict[str, dict[str, Any]] = {}
    inputs: dict[str, Any] | None = None


def read_checked(path: Path, schema: type[Schema], mend: str) -> dict[str, Any]:
    """The content of a JSON file, unchanged. InputError where it does not follow the schema."""
    content = read_json(path, mend)
    check_schema(content, schema, path, mend)
    return content


def check_schema(content: Mapping[str, Any], schema: type[Schema], path: object, mend: str) -> None:
    """InputError that names the first entry which does not follow the schema."""
    if found := first_mistake(content, schema):
        raise InputError(f"{path}: {found[0] or 'its content'}: {found[1]}; {mend}")


def check_setting(content: Mapping[str, Any], schema: type[Schema], key: str) -> None:
    """InputError that names the first setting below `key` which does not follow the schema."""
    if found := first_mistake(plain(content), schema):
        raise InputError(
            f"{key}.{found[0]}={found[2]!s:.80}: {found[1]}".replace("Input should", "it should")
        )


def first_mistake(content: Mapping[str, Any], schema: type[Schema]) -> tuple[str, str, Any] | None:
    """(dotted key, what is wrong, value) of the first entry that does not follow the schema, or None."""
    try:
        schema.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        names = [str(part) for part in first["loc"] if is_key(part)]
        return ".".join(names)[:120], first["msg"].removeprefix("Value error, "), first["input"]
    return None


def plain(value: Any) -> Any:
    """Converts mappings and sequences of any kind to dicts and lists, as JSON has them."""
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    return (
        [plain(part) for part in value]
        if isinstance(value, Sequence) and not isinstance(value, str)
        else value
    )


def is_key(part: int | str) -> bool:
    """Whether a part of pydantic's path to an entry is a key, and not the name of a type that was tried."""
    return isinstance(part, int) or not any(sign in part for sign in "[(") and part not in TYPES


TYPES = ("int", "float", "str", "bool")
