"""Reads the index of a prepared folder."""

from pathlib import Path

from medldm.attributes import with_attributes, with_unknown
from medldm.data.datasets.mnms2 import MAPPING_INDEX, load_mapping_index
from medldm.errors import InputError
from medldm.files import read_json
from medldm.schemas import Index, check_schema

UNFINISHED = (
    "unfinished"  # the key of an index, while its cases are replaced, that holds the command which does so
)


def load_index(root: str | Path) -> dict:
    """The `index.json` of a prepared folder, or the same facts of a folder of ldm-medical-image."""
    root = Path(root)
    mend = f"run `medldm prepare data.raw=RAW data.root={root}` first"
    if not root.is_dir():
        raise InputError(f"data.root={root}: no such folder; {mend}")
    if not (root / "index.json").is_file() and (root / MAPPING_INDEX).is_file():
        return with_attributes(load_mapping_index(root))
    index = read_json(root / "index.json", mend)
    if UNFINISHED in index:
        raise InputError(
            f"{root / 'index.json'}: preparation did not finish, old and new cases are mixed; run "
            f"`{index[UNFINISHED]}` again"
        )
    if index.get("schema_version") != 1:
        raise InputError(
            f"{root / 'index.json'}: schema version {index.get('schema_version')} is not 1; prepare the "
            "data again"
        )
    check_schema(index, Index, root / "index.json", "prepare the data again")
    return with_attributes(with_unknown(index))
