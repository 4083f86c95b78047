"""Draws chest X-rays in the raw layouts of NIH ChestX-ray14 and of class folders.

The absorption of body, lungs, mediastinum, ribs, clavicles and diaphragm adds up, and the picture follows
from its exponential. Pneumonia is one or two soft opacities in a lung.
"""

from pathlib import Path

import numpy as np
from scipy import ndimage

from medldm.data.phantoms.files import Progress, check_picture_request, save_rows
from medldm.files import replacing


def smooth_step(distance: np.ndarray, width: float) -> np.ndarray:
    """1 inside, where the distance is negative, 0 outside, and a soft step of this width between."""
    return 1 / (1 + np.exp(np.clip(distance / width, -40, 40)))


def ellipse(
    x: np.ndarray, y: np.ndarray, center: tuple[float, float], radii: tuple[float, float], angle: float = 0
) -> np.ndarray:
    """The approximate signed distance to an ellipse in units of the field of view, negative inside."""
    c, s = np.cos(angle), np.sin(angle)
    dx, dy = x - center[0], y - center[1]
    u, v = (c * dx + s * dy) / radii[0], (c * dy - s * dx) / radii[1]
    return (np.sqrt(u * u + v * v) - 1) * min(radii)


def draw_radiograph(g: np.random.Generator, size: int, *, has_pneumonia: bool) -> np.ndarray:
    """(H, W) float in [0, 1], bright where much is absorbed. It is a little wider than high, as real ones
    are.
    """
    height, width = size, round(size * g.uniform(1.0, 1.15))
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    x, y = x + g.normal(0, 0.03), y + g.normal(0, 0.03)
    scale = g.uniform(0.92, 1.06)
    x, y = x / scale, y / scale
    lean = g.normal(0, 0.04)
    x = x + lean * y
    trunk = ellipse(x, y, (0, 0.35), (0.88, 1.35))
    neck = ellipse(x, y, (0, -0.95), (0.26, 0.35))
    dose = 0.9 * smooth_step(np.minimum(trunk, neck), 0.02)
    lungs = np.zeros_like(dose)
    for side in (-1, 1):
        radii = (0.31 * g.uniform(0.94, 1.06), 0.62 * g.uniform(0.94, 1.06))
        lung = ellipse(x, y, (side * 0.4, -0.08), radii, side * 0.1)
        dome = y - (0.42 + 0.05 * (side > 0) + 0.35 * (x - side * 0.4) ** 2)  # the diaphragm
        lungs += smooth_step(np.maximum(lung, dome), 0.025)
    dose -= 0.62 * lungs
    heart = ellipse(x, y, (0.12, 0.22), (0.3 * g.uniform(0.9, 1.15), 0.26), 0.5)
    dose += 0.5 * smooth_step(np.minimum(heart, ellipse(x, y, (0, -0.2), (0.12, 0.7))), 0.03)
    dose += 0.18 * smooth_step(np.abs(x) - 0.055, 0.015)  # spine
    chest = smooth_step(trunk + 0.04, 0.02)
    for i in range(9):
        level = -0.72 + 0.155 * i
        arc = y - (level + 0.34 * (np.abs(x) - 0.45) ** 2 + 0.16 * np.abs(x))
        dose += 0.09 * smooth_step(np.abs(arc) - 0.022, 0.008) * chest
    for side in (-1, 1):
        clavicle = y - (-0.62 - 0.18 * side * x)
        inside = (side * x > 0.04) & (side * x < 0.7)
        dose += 0.16 * smooth_step(np.abs(clavicle) - 0.024, 0.008) * inside * chest
    markings = ndimage.gaussian_filter(g.normal(size=dose.shape), size / 90)
    dose += 0.035 * markings / markings.std() * lungs
    if has_pneumonia:
        for _ in range(int(g.integers(1, 3))):
            center = (g.choice([-1, 1]) * g.uniform(0.3, 0.5), g.uniform(-0.2, 0.3))
            cloud = ndimage.gaussian_filter(g.normal(size=dose.shape), size / 30)
            edge = ellipse(x, y, center, (g.uniform(0.14, 0.24), g.uniform(0.14, 0.28)))
            dose += 0.34 * smooth_step(edge + 0.05 * cloud / cloud.std(), 0.06) * lungs
    image = 1 - np.exp(-1.7 * np.clip(dose, 0, None))
    image = ndimage.gaussian_filter(image, size / 500) + g.normal(0, 0.008, dose.shape)
    return np.clip(image / 0.92, 0, 1)


def save_grey(path: Path, image: np.ndarray, suffix: str) -> None:
    """Writes an image in [0, 1] as a PNG or JPEG of 8-bit grey."""
    import cv2

    _, data = cv2.imencode(suffix, np.rint(255 * image).astype(np.uint8))
    with replacing(path) as temporary:
        temporary.write_bytes(data.tobytes())


def write_chestxray(
    root: str | Path, *, num_subjects: int, seed: int = 0, image_size: int = 256,
    progress: Progress = lambda: None,
) -> Path:  # fmt: skip
    """Writes one picture for each patient in NORMAL/ and PNEUMONIA/, named as Kermany et al. do. Returns the
    root.
    """
    root = Path(root)
    check_picture_request(num_subjects, image_size)
    for number in range(1, num_subjects + 1):
        g = np.random.default_rng((seed, number))
        is_sick = number % 2 == 0
        name = f"person{number}_bacteria_{number}.jpeg" if is_sick else f"IM-{number:04d}-0001.jpeg"
        image = draw_radiograph(g, image_size, has_pneumonia=is_sick)
        save_grey(root / ("PNEUMONIA" if is_sick else "NORMAL") / name, image, ".jpeg")
        progress()
    return root


def write_nih_cxr14(
    root: str | Path, *, num_subjects: int, seed: int = 0, image_size: int = 256,
    progress: Progress = lambda: None,
) -> Path:  # fmt: skip
    """Writes one or two pictures for each patient in images_001/images/ and Data_Entry_2017.csv. Returns the
    root.
    """
    root = Path(root)
    check_picture_request(num_subjects, image_size)
    rows = []
    for number in range(1, num_subjects + 1):
        g = np.random.default_rng((seed, number))
        for visit in range(int(g.integers(1, 3))):
            is_sick = bool(g.random() < 0.5)
            name = f"{number:08d}_{visit:03d}.png"
            image = draw_radiograph(g, image_size, has_pneumonia=is_sick)
            save_grey(root / "images_001" / "images" / name, image, ".png")
            rows.append(
                {
                    "Image Index": name,
                    "Finding Labels": "Pneumonia" if is_sick else "No Finding",
                    "Follow-up #": visit,
                    "Patient ID": number,
                    "Patient Age": int(g.integers(18, 90)),
                    "Patient Gender": "MF"[number % 2],
                    "View Position": ("PA", "AP")[number % 2],
                }
            )
        progress()
    save_rows(root / "Data_Entry_2017.csv", rows)
    return root


CHEST_PHANTOMS = {"chestxray": write_chestxray, "nih_cxr14": write_nih_cxr14}
