"""The folder that `medldm sample` writes: an HDF5 file per case, volumes as NIfTI too, pictures and
provenance.json.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from medldm.data.dataset import CaseDataset
from medldm.data.readers import open_hdf5
from medldm.data.transforms import as_classes
from medldm.errors import InputError
from medldm.files import replacing, write_json
from medldm.plots import middle_slice, save_png

COPIED = ("view", "phase", "label", "source_label", "target_label", "slice_index", "num_slices", "spacing")


def claim(root: Path, provenance: Mapping[str, Any]) -> None:
    """Write provenance.json. InputError where the folder was begun with other settings."""
    path = root / "provenance.json"
    settings = json.loads(json.dumps(provenance))
    if path.is_file():
        earlier = json.loads(path.read_text())
        changed = sorted(key for key in settings if earlier.get(key) != settings[key])
        if changed:
            raise InputError(
                f"output={root}: holds images of another {changed[0]} ({earlier.get(changed[0])}); "
                "give another folder, or delete it"
            )
    write_json(path, settings)


class SampleFolder:
    """Writes case by case, each file whole or not at all; a folder of other settings is refused, a begun one
    continued.
    """

    def __init__(
        self, root: Path, dataset: CaseDataset, provenance: dict[str, Any], *, png: bool = True
    ) -> None:
        self.root, self.dataset, self.png = root, dataset, png
        claim(root, provenance)

    def path(self, case: int) -> Path:
        return self.root / f"{self.dataset.cases[case]['id']}.h5"

    def has(self, case: int) -> bool:
        return self.path(case).is_file()

    def write(
        self,
        case: int,
        positions: Sequence[int],
        samples: Sequence[Tensor],
        batches: Sequence[dict[str, Any]],
    ) -> None:
        """`samples`: one (N, C, *S) in [-1, 1] per sample, in the order of `positions`; `batches` hold the
        conditions.
        """
        if self.dataset.spatial_dims == 2:
            self.write_slices(case, positions, samples, batches)
        else:
            self.write_volume(case, samples, batches)

    def write_gif(self, name: str, frames: Sequence[Tensor]) -> None:
        """Middle slices of (1, C, *S) images in [-1, 1], one frame each."""
        pictures = [to_uint8(middle_slice(frame, self.dataset.orientation)[0, :1]) for frame in frames]
        save_gif(self.root / f"{name}.gif", [picture[0].numpy() for picture in pictures])

    def write_series(self, name: str, images: Tensor, shares: Sequence[float]) -> None:
        """(N, C, *S) images between two cases, as HDF5 and GIF."""
        path = self.root / f"{name}.h5"
        with replacing(path) as aside, h5py.File(aside, "w") as file:
            file["images"] = images[:, 0].numpy()
            file["share"] = np.asarray(shares, np.float32)
        self.write_gif(name, images[:, None].unbind(0))

    def write_slices(
        self,
        case: int,
        positions: Sequence[int],
        samples: Sequence[Tensor],
        batches: Sequence[dict[str, Any]],
    ) -> None:
        rows = [self.dataset.items[p].row for p in positions]
        source = open_hdf5(self.dataset.path("image", case))
        with replacing(self.path(case)) as aside, h5py.File(aside, "w") as file:
            for k, images in enumerate(samples):
                array = images[:, 0].numpy()
                file.create_dataset(
                    f"images_{k}" if k else "images", data=array, chunks=(1, *array.shape[1:])
                )
            for key, name in (("edges", "edges"), ("mask", "semantic_maps")):
                if key in batches[0]:
                    array = torch.cat([b[key][:, 0] for b in batches]).numpy()
                    file[name] = as_classes(array, f"{self.path(case)}: {key}")
            for name in COPIED:
                if name in source:
                    file[name] = source.read(name)[rows]
            file["row"] = np.asarray(rows, np.int32)
            for name, value in source.attributes.items():
                file.attrs[name] = value
        for row, image in zip(rows, samples[0] if self.png else (), strict=False):
            name = f"{self.dataset.cases[case]['id']}_{row:03d}.png"
            save_png(self.root / "png" / name, to_uint8(image).expand(3, -1, -1))

    def write_volume(self, case: int, samples: Sequence[Tensor], batches: Sequence[dict[str, Any]]) -> None:
        entry = self.dataset.cases[case]
        mask = batches[0]["mask"][0].numpy() if batches and "mask" in batches[0] else None
        volumes = [sample[0].numpy() for sample in samples]
        facts = {key: entry[key] for key in COPIED if key in entry}
        write_volumes(self.root, entry["id"], volumes, entry, mask=mask, attributes=facts)
        if self.png:
            middle = to_uint8(middle_slice(samples[0], self.dataset.orientation)[0])
            save_png(self.root / "png" / f"{entry['id']}.png", middle.expand(3, -1, -1))


def write_volumes(
    root: Path,
    name: str,
    volumes: Sequence[np.ndarray],
    record: Mapping[str, Any],
    *,
    mask: np.ndarray | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> Path:
    """Samples of one case, each (1, D, H, W) in [-1, 1], twice: `<name>.h5` holds them on the prepared grid
    (`images`, `images_1`...), which `medldm evaluate` reads; `<name>.nii.gz` the first and
    `nifti_samples/<name>_<k>.nii.gz` the others on the grid and in the units of the source, for people.
    Returns the HDF5 file, which is written last: where it stands, all is written.

    `record` is the case's entry of the index, or `Volume.record()`; `mask` (1, D, H, W) goes along.
    """
    from medldm.data.volumes import restore_volume  # MONAI, which 2D does without

    for k, volume in enumerate(volumes):
        path = root / "nifti_samples" / f"{name}_{k}.nii.gz" if k else root / f"{name}.nii.gz"
        write_nifti(path, *restore_volume(volume, record))
    with replacing(root / f"{name}.h5") as aside, h5py.File(aside, "w") as file:
        for k, volume in enumerate(volumes):
            file[f"images_{k}" if k else "images"] = np.asarray(volume, np.float32)
        if mask is not None:
            file["mask"] = as_classes(mask, f"{root / name}: mask")
        file.attrs["spatial_dims"] = 3
        for key in ("subject", "affine", "original_affine", "original_shape", "intensity_range"):
            if key in record:
                file.attrs[key] = record[key]
        file.attrs.update(attributes or {})
    return root / f"{name}.h5"


def save_gif(path: Path, frames: Sequence[np.ndarray], milliseconds: int = 200) -> None:
    """(H, W) uint8 frames; the last one stays longer."""
    from PIL import Image

    pictures = [Image.fromarray(frame) for frame in frames]
    times = [milliseconds] * (len(frames) - 1) + [5 * milliseconds]
    with replacing(path) as aside:
        pictures[0].save(
            aside, format="GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0
        )


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    import gzip

    import nibabel

    with replacing(path) as aside:
        aside.write_bytes(gzip.compress(nibabel.Nifti1Image(array, affine).to_bytes(), compresslevel=3))


def to_uint8(x: Tensor) -> Tensor:
    """(1, H, W) in [-1, 1] -> 0..255, rounded."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
