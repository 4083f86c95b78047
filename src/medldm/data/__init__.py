"""Data: raw images are read (`raw`, `datasets`), prepared (`preparation`) and given to models in batches
(`loading`).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from medldm.errors import InputError, told_of
from medldm.signatures import check_arguments

if TYPE_CHECKING:
    from medldm.data.loading.datamodule import CaseDataModule

# Keys of configs/data/*.yaml that only `medldm prepare` reads; training finds their results in index.json.
PREPARE_KEYS = {
    "dataset", "raw", "image_size", "preprocess", "splits", "select", "modalities", "label_dir", "task",
    "cine",
}  # fmt: skip
UNSET = (None, "???")
# Datasets that need no files: data.dataset -> data module.
GENERATED = {"swirl": "medldm.data.phantoms.swirl.SwirlDataModule"}


def build_datamodule(
    data: Mapping[str, Any], *, keys: Sequence[str], seed: int, with_cine: bool = False
) -> "CaseDataModule":
    """The data module of a plain `data` config; `with_cine` is for the training of an autoencoder. InputError
    where the prepared folder is missing or has other dimensions than the config.
    """
    from medldm.data.loading.datamodule import CaseDataModule
    from medldm.data.loading.settings import LoaderSettings

    settings = {key: value for key, value in data.items() if key not in PREPARE_KEYS}
    dataset = data.get("dataset")
    if not isinstance(dataset, str | None):
        raise InputError(f"data.dataset={dataset!s:.80}: give the name of a dataset")
    if dataset in GENERATED:
        return generated(dataset, settings, seed)
    with told_of("data"):
        check_arguments(LoaderSettings, settings)
    root, spatial_dims = settings.pop("root", None), settings.pop("spatial_dims", None)
    if root in UNSET:
        raise InputError("data.root: not given; name the folder that `medldm prepare` wrote as data.root=DIR")
    try:
        module = CaseDataModule(root, keys=keys, seed=seed, with_cine=with_cine, **settings)
    except TypeError as error:
        raise InputError(
            f"data: {str(error).split('__init__() ')[-1]}; see configs/data for the keys"
        ) from error
    module.setup()
    prepared = module.facts["spatial_dims"]
    if spatial_dims not in (*UNSET, prepared):
        raise InputError(
            f"data.spatial_dims={spatial_dims}: {root} was prepared in {prepared}D; set it to {prepared}"
        )
    return module


def generated(name: str, settings: dict[str, Any], seed: int) -> Any:
    """The data module of a dataset that is made on the fly."""
    from importlib import import_module

    module, _, class_name = GENERATED[name].rpartition(".")
    # null means "not wanted": debug=tiny switches crops off for every dataset.
    settings = {key: v for key, v in settings.items() if key not in ("root", "latents") and v is not None}
    try:
        return getattr(import_module(module), class_name)(seed=seed, **settings)
    except TypeError as error:
        raise InputError(
            f"data: {str(error).split('__init__() ')[-1]}; see configs/data/{name}.yaml for the keys"
        ) from error
