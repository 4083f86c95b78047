"""Writes cardiac MR in the layout of M&Ms-2, so that the demo and the tests go through its real reader."""

from pathlib import Path

import numpy as np

from medldm.data.phantoms.canvas import Canvas
from medldm.data.phantoms.files import Progress, check_picture_request, save_nifti, save_rows
from medldm.data.phantoms.folder import write_folder
from medldm.data.phantoms.heart import Anatomy, contraction_of, draw_chest, draw_long_axis, draw_short_axis

VENDORS = {  # scanner, field in T, grey scale, gamma, noise
    "SIEMENS": ("Avanto", 1.5, 520.0, 1.0, 0.012),
    "PHILIPS": ("Achieva", 1.5, 1400.0, 0.85, 0.016),
    "GE MEDICAL SYSTEMS": ("Signa Explorer", 3.0, 2600.0, 1.15, 0.020),
}
DISEASES = ("NOR", "LV", "HCM", "ARR", "FALL", "CIA", "RV", "TRI")


def finish(values: np.ndarray, a: Anatomy, vendor: str, generator: np.random.Generator) -> np.ndarray:
    """Adds coil shading, the scanner's contrast and Rician noise; returns int16 in the vendor's
    grey scale.
    """
    _, _, scale, gamma, noise = VENDORS[vendor]
    height, width = values.shape
    y, x = (
        np.linspace(-1, 1, height, dtype=np.float32)[:, None],
        np.linspace(-1, 1, width, dtype=np.float32)[None],
    )
    shaded = np.clip(values, 0, None) ** np.float32(gamma) * (
        1 + np.float32(a.bias[0]) * x + np.float32(a.bias[1]) * y
    )
    real, imaginary = generator.normal(0, noise, (2, height, width)).astype(np.float32)
    return np.rint(scale * np.hypot(shaded + real, imaginary)).astype(np.int16)


def cine(
    view: str, shape: tuple[int, int, int], spacing: tuple[float, float, float], a: Anatomy, vendor: str,
    num_frames: int, generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Draws images (X, Y, Z, T) int16 and class maps (X, Y, Z, T) uint8 of one view."""
    width, height, depth = shape
    images = np.empty((*shape, num_frames), np.int16)
    labels = np.zeros((*shape, num_frames), np.uint8)
    for z in range(depth):
        # one slice may lie beyond base and apex
        place = (z - 0.5) * spacing[2] / a.length if view == "SA" else 0.4
        background = Canvas((height, width), (spacing[1], spacing[0]), a.pose)
        draw_chest(background, a, 1.6 * place - 0.7)
        for frame in range(num_frames):
            canvas, beat = background.copy(), contraction_of(frame, num_frames)
            if view == "LA":
                classes = draw_long_axis(canvas, a, beat)
            elif place < 0:  # above the valve there is an atrium
                classes = np.zeros(canvas.shape, np.uint8)
                canvas.paint(canvas.ellipse(tuple(a.heart), (36, 30)) - 3, a.signal["fat"])
                canvas.paint(canvas.ellipse(tuple(a.heart), (36, 30)), a.signal["blood"])
            else:
                classes = draw_short_axis(canvas, a, place, beat)
            images[:, :, z, frame] = finish(canvas.values, a, vendor, generator).T
            labels[:, :, z, frame] = classes.T
    return images, labels


def write_mnms2_subject(
    root: Path, number: int, seed: int, image_size: int, num_slices: tuple[int, int]
) -> dict:
    """Writes one subject, and returns its row of dataset_information.csv. `image_size` is the typical side of
    a slice in pixels.
    """
    generator = np.random.default_rng((seed, number))
    disease = DISEASES[int(generator.integers(len(DISEASES)))]
    vendor = list(VENDORS)[number % len(VENDORS)]
    anatomy = Anatomy(generator, disease)
    name = f"{number:03d}"
    folder = root / "dataset" / name
    for view in ("LA", "SA"):
        width = round(image_size * generator.uniform(0.9, 1.1))
        height = round(width * generator.uniform(0.82, 1.0))
        pixel = generator.uniform(290, 360) * anatomy.size / width
        depth = 1 if view == "LA" else int(generator.integers(num_slices[0], num_slices[1] + 1))
        thickness = 8.0 if view == "LA" else 1.12 * anatomy.length / max(depth - 1, 1)
        spacing = (pixel, pixel, thickness)
        images, labels = cine(view, (width, height, depth), spacing, anatomy, vendor, 4, generator)
        affine = np.diag([-pixel, -pixel, thickness, 1.0])
        affine[:3, 3] = [pixel * width / 2, pixel * height / 2, -thickness * depth / 2]
        save_nifti(folder / f"{name}_{view}_CINE.nii.gz", images, spacing, affine)
        for phase, frame in (("ED", 0), ("ES", 2)):
            save_nifti(folder / f"{name}_{view}_{phase}.nii.gz", images[..., frame], spacing, affine)
            save_nifti(folder / f"{name}_{view}_{phase}_gt.nii.gz", labels[..., frame], spacing, affine)
    scanner, field = VENDORS[vendor][:2]
    return {"SUBJECT_CODE": number, "DISEASE": disease, "VENDOR": vendor, "SCANNER": scanner, "FIELD": field}


def write_mnms2(
    root: str | Path, *, num_subjects: int, seed: int = 0, image_size: int = 256,
    num_slices: tuple[int, int] = (8, 12), progress: Progress = lambda: None,
) -> Path:  # fmt: skip
    """Writes subjects 001, 002... with SA and LA, ED and ES, class maps and CINE, and
    dataset_information.csv. Returns the root.
    """
    root = Path(root)
    check_picture_request(num_subjects, image_size)
    rows = []
    for number in range(1, num_subjects + 1):
        rows.append(write_mnms2_subject(root, number, seed, image_size, tuple(num_slices)))
        progress()
    save_rows(root / "dataset_information.csv", rows)
    return root


PHANTOMS = {"mnms2": write_mnms2, "folder": write_folder}
