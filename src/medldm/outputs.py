"""The folder that `medldm sample` writes: an HDF5 file per case, volumes as NIfTI too, pictures and
provenance.json.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import Tensor

from medldm.batch import to_uint8
from medldm.data.loading.dataset import CaseDataset
from medldm.data.preparation.labels import as_classes
from medldm.errors import InputError
from medldm.files import inside, replacing, write_json, write_nifti, writing_hdf5
from medldm.fingerprints import digest
from medldm.locks import while_beginning
from medldm.plots import SAVE_VIDEO, middle_slice, save_png
from medldm.schemas import Provenance, read_checked

log = logging.getLogger(__name__)
VIDEO_FORMATS = tuple(SAVE_VIDEO)
COPIED = ("view", "phase", "label", "source_label", "target_label", "slice_index", "num_slices", "spacing")


# Keys of a provenance that do not decide the images: where inputs lay (a moved dataset is the same one), and
# what is known of the whole dataset.
REMARKS = ("checkpoint", "command", "data_root", "training_subjects", "unrecorded_stages")
NAMES = {"cases": "set of cases", "checkpoint_sha256": "checkpoint"}  # of settings, in messages


def settings_of(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a provenance that decides the images, as JSON would read it back."""
    return {key: value for key, value in json.loads(json.dumps(provenance)).items() if key not in REMARKS}


def claim(root: Path, provenance: Mapping[str, Any]) -> None:
    """Write provenance.json. InputError where the folder was begun with other settings; a setting that an
    older medldm did not record counts as equal.
    """
    path = root / "provenance.json"
    settings = settings_of(provenance)
    if path.is_file():
        earlier = read_checked(path, Provenance, "give another folder, or delete it")
        changed = sorted(key for key in settings.keys() & earlier.keys() if earlier[key] != settings[key])
        if changed:
            raise InputError(
                f"output={root}: holds images of another {NAMES.get(changed[0], changed[0])} "
                f"({earlier[changed[0]]}); give another folder, or delete it"
            )
    write_json(path, json.loads(json.dumps(provenance)))


class SampleFolder:
    """A folder that is written case by case, each file whole or not at all. One that holds images of other
    settings is refused, and one that was begun is continued.
    """

    def __init__(
        self,
        root: Path,
        dataset: CaseDataset,
        provenance: dict[str, Any],
        *,
        png: bool = True,
        video_format: str = "gif",
    ) -> None:
        self.root, self.dataset, self.png, self.video_format = root, dataset, png, video_format
        self.settings = digest(settings_of(provenance))
        with while_beginning(root):
            claim(root, provenance)

    def path(self, case: int) -> Path:
        return inside(self.root, f"{self.dataset.cases[case]['id']}.h5")

    def made_from(self, case: int) -> dict[str, str]:
        """The attributes of a case's file: its conditions, where they are known, and the settings
        of the run.
        """
        conditions = self.dataset.made_from(case)
        known = {} if conditions is None else {"made_from": json.dumps(conditions)}
        return known | {"settings_digest": self.settings}

    def reason_to_write(self, case: int) -> str | None:
        """Why the images of a case must be made, None where those that stand are of this case and run."""
        path = self.path(case)
        if not path.is_file():
            return "not there yet"
        expected = self.made_from(case)
        try:
            with h5py.File(path, "r") as file:
                stated = {key: file.attrs.get(key) for key in expected}
        except OSError:
            return "damaged"
        if stated == expected or "made_from" not in expected:
            return None
        if stated["made_from"] is None:
            return "of unknown conditions (an older medldm made them)"
        return (
            "of other settings"
            if stated["made_from"] == expected["made_from"]
            else "of cases as prepared before"
        )

    def pending(self, cases: Sequence[int]) -> list[int]:
        """The cases that are to be made. Where images stand and are made anew, the log says why."""
        why = {case: self.reason_to_write(case) for case in cases}
        known = [self.dataset.made_from(case) is not None for case in cases]
        stand = [case for case in cases if self.path(case).is_file()]
        if stand and not all(known):
            log.warning(
                "%s: the data were prepared by an older medldm, which did not record what the cases hold; "
                "images are kept by the cases' names",
                self.root,
            )
        for reason, count in Counter(why[case] for case in stand if why[case]).items():
            log.warning("%s: %d of %d cases made anew, %s", self.root, count, len(cases), reason)
        return [case for case in cases if why[case]]

    def remove_pictures(self, case: int) -> None:
        """Remove the pictures of an earlier preparation of the case, which may have had more slices."""
        name = re.compile(re.escape(self.dataset.cases[case]["id"]) + r"(_\d+)?\.png")
        for path in inside(self.root, "png", "*").parent.glob("*.png"):
            if name.fullmatch(path.name):
                path.unlink()

    def write(
        self,
        case: int,
        positions: Sequence[int],
        samples: Sequence[Tensor],
        batches: Sequence[dict[str, Any]],
    ) -> None:
        """Write the images of a case. `samples` holds one (N, C, *S) in [-1, 1] for each sample, in the order
        of `positions`, and `batches` the conditions. The HDF5 file is written last: where it stands, the
        pictures do too.
        """
        if self.path(case).is_file():
            self.remove_pictures(case)
        if self.dataset.spatial_dims == 2:
            self.write_slices(case, positions, samples, batches)
        else:
            self.write_volume(case, samples, batches)

    def write_video(self, name: str, frames: Sequence[Tensor]) -> None:
        """Middle slices of (1, C, *S) images in [-1, 1], one frame each, as `<name>.<video_format>`."""
        pictures = [to_uint8(middle_slice(frame, self.dataset.orientation)[0, :1]) for frame in frames]
        path = inside(self.root, f"{name}.{self.video_format}")
        SAVE_VIDEO[self.video_format](path, [picture[0].numpy() for picture in pictures])

    def write_series(self, name: str, images: Tensor, shares: Sequence[float]) -> None:
        """(N, C, *S) images between two cases, as HDF5 and video."""
        path = inside(self.root, f"{name}.h5")
        with replacing(path) as aside, writing_hdf5(aside) as file:
            file["images"] = images[:, 0].numpy()
            file["share"] = np.asarray(shares, np.float32)
        self.write_video(name, images[:, None].unbind(0))

    def write_slices(
        self,
        case: int,
        positions: Sequence[int],
        samples: Sequence[Tensor],
        batches: Sequence[dict[str, Any]],
    ) -> None:
        """Writes samples of slices: pictures, then the HDF5 file of the case."""
        rows = [self.dataset.items[p].row for p in positions]
        for row, image in zip(rows, samples[0] if self.png else (), strict=False):
            name = f"{self.dataset.cases[case]['id']}_{row:03d}.png"
            save_png(inside(self.root, "png", name), to_uint8(image).expand(3, -1, -1))
        source = self.dataset.reader("image", case)
        with replacing(self.path(case)) as aside, writing_hdf5(aside) as file:
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
            file.attrs.update(self.made_from(case))

    def write_volume(self, case: int, samples: Sequence[Tensor], batches: Sequence[dict[str, Any]]) -> None:
        entry = self.dataset.cases[case]
        mask = batches[0]["mask"][0].numpy() if batches and "mask" in batches[0] else None
        volumes = [sample[0].numpy() for sample in samples]
        facts = {key: entry[key] for key in COPIED if key in entry} | self.made_from(case)
        if self.png:
            middle = to_uint8(middle_slice(samples[0], self.dataset.orientation)[0])
            save_png(inside(self.root, "png", f"{entry['id']}.png"), middle.expand(3, -1, -1))
        write_volumes(self.root, entry["id"], volumes, entry, mask=mask, attributes=facts)


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
    from medldm.data.preparation.volume_transforms import restore_volume  # MONAI, which 2D does without

    for k, volume in enumerate(volumes):
        parts = ("nifti_samples", f"{name}_{k}.nii.gz") if k else (f"{name}.nii.gz",)
        write_nifti(inside(root, *parts), *restore_volume(volume, record))
    path = inside(root, f"{name}.h5")
    with replacing(path) as aside, writing_hdf5(aside) as file:
        for k, volume in enumerate(volumes):
            file[f"images_{k}" if k else "images"] = np.asarray(volume, np.float32)
        if mask is not None:
            file["mask"] = as_classes(mask, f"{path}: mask")
        file.attrs["spatial_dims"] = 3
        for key in ("subject", "affine", "original_affine", "original_shape", "intensity_range"):
            if key in record:
                file.attrs[key] = record[key]
        file.attrs.update(attributes or {})
    return path
