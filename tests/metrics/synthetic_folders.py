import json

import h5py
import numpy as np
from scipy.ndimage import gaussian_filter


def smooth_images(num: int, size: int, seed: int) -> np.ndarray:
    """(N, H, W) float32 in [-1, 1]: smooth blobs, every image another."""
    rng = np.random.default_rng(seed)
    images = gaussian_filter(rng.normal(size=(num, size, size)), (0, 3, 3))
    return (images / np.abs(images).max((1, 2), keepdims=True)).astype(np.float32)


def write_case(path, images: np.ndarray, extra: dict | None = None) -> None:
    """A file of the 2D schema: two long-axis slices, then short-axis stacks at ED and ES."""
    num = len(images)
    half = (num - 2) // 2
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["images"] = images
        file["edges"] = (np.abs(np.diff(images, axis=2, prepend=0)) > 0.1).astype(np.uint8)
        file["semantic_maps"] = (images > 0).astype(np.uint8)
        file["view"] = np.array([1, 1] + [0] * (2 * half), np.uint8)
        file["phase"] = np.array([0, 1] + [0] * half + [1] * half, np.uint8)
        file["slice_index"] = np.array([0, 0, *range(half), *range(half)], np.int16)
        file["num_slices"] = np.array([1, 1] + [half] * (2 * half), np.int16)
        file.attrs["subject_id"] = path.stem
        for name, value in (extra or {}).items():
            file[name] = value


def smooth_volumes(num: int, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """(N, 1, D, H, W) float32 in [-0.9, 0.9]."""
    rng = np.random.default_rng(seed)
    volumes = gaussian_filter(rng.normal(size=(num, 1, *shape)), (0, 0, 2, 2, 2))
    return (0.9 * volumes / np.abs(volumes).max((1, 2, 3, 4), keepdims=True)).astype(np.float32)


def write_prepared_volumes(root, volumes: dict, *, orientation: str = "SPL", subjects: dict | None = None):
    """A prepared folder of `case -> (image, mask)`; `subjects` names the subject of a case, else itself."""
    (root / "cases").mkdir(parents=True)
    cases = []
    for name, (image, mask) in volumes.items():
        with h5py.File(root / "cases" / f"{name}.h5", "w") as file:
            file["image"] = image.astype(np.float16)
            file["mask"] = mask.astype(np.uint8)
        subject = (subjects or {}).get(name, name)
        cases.append({"id": name, "subject": subject, "file": f"cases/{name}.h5", "attributes": {}})
    index = {"schema_version": 1, "dataset": "folder", "spatial_dims": 3, "num_classes": 2, "cases": cases}
    index |= {"preprocess": {"orientation": orientation}, "image_channels": 1}
    (root / "index.json").write_text(json.dumps(index))


def write_sample(root, name: str, *volumes: np.ndarray) -> None:
    root.mkdir(parents=True, exist_ok=True)
    with h5py.File(root / f"{name}.h5", "w") as file:
        for k, volume in enumerate(volumes):
            file[f"images_{k}" if k else "images"] = volume
        file.attrs["spatial_dims"] = 3
