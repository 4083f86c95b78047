"""Synthetic subjects written in a dataset's own raw layout, so that demo and tests go through the real
readers.

Anatomy is drawn in millimetres with soft signed distances: an oblique chest with fat, muscle, ribs, lungs,
liver, spine and aorta, and a beating heart. Borders and class maps follow from the same distances, and
textures hang on the anatomy, so that edges and class map determine much of the image.
"""

import csv
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
from scipy import ndimage

from medldm.errors import InputError
from medldm.files import replacing

Progress = Callable[[], None]
VENDORS = {  # scanner, field in T, grey scale, gamma, noise
    "SIEMENS": ("Avanto", 1.5, 520.0, 1.0, 0.012),
    "PHILIPS": ("Achieva", 1.5, 1400.0, 0.85, 0.016),
    "GE MEDICAL SYSTEMS": ("Signa Explorer", 3.0, 2600.0, 1.15, 0.020),
}
DISEASES = ("NOR", "LV", "HCM", "ARR", "FALL", "CIA", "RV", "TRI")
TISSUE = {  # balanced steady-state signal relative to blood
    "air": 0.02, "lung": 0.06, "fat": 0.88, "muscle": 0.27, "bone": 0.10, "marrow": 0.48, "liver": 0.36,
    "vessel": 0.72, "myocardium": 0.31, "blood": 0.93, "spleen": 0.52, "cord": 0.66,
}  # fmt: skip


class Canvas:
    """A slice in mm: x to the right of the patient's picture, y downwards, painted back to front.

    `pose` (angle, right, down) turns and shifts the patient within the field of view.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        spacing: tuple[float, float],
        pose: tuple[float, float, float] = (0, 0, 0),
    ) -> None:
        y = (np.arange(shape[0], dtype=np.float32) - (shape[0] - 1) / 2) * np.float32(spacing[0]) - pose[2]
        x = (np.arange(shape[1], dtype=np.float32) - (shape[1] - 1) / 2) * np.float32(spacing[1]) - pose[1]
        y, c, s = (
            y.reshape(-1, 1).astype(np.float32),
            np.float32(np.cos(pose[0])),
            np.float32(np.sin(pose[0])),
        )
        x = x.astype(np.float32)
        self.x, self.y = c * x + s * y, c * y - s * x
        self.shape = shape
        self.softness = 0.55 * max(spacing)
        self.values = np.full(shape, TISSUE["air"], np.float32)

    def copy(self) -> "Canvas":
        other = object.__new__(Canvas)
        other.__dict__.update(self.__dict__)
        other.values = self.values.copy()
        return other

    def ellipse(
        self,
        center: tuple[float, float],
        radii: tuple[float, float],
        angle: float = 0.0,
        lobes: np.ndarray | None = None,
    ) -> np.ndarray:
        """Approximate signed distance in mm, negative inside; `lobes` are relative Fourier amplitudes of the
        outline.
        """
        dx, dy = self.x - center[0], self.y - center[1]
        c, s = np.cos(angle), np.sin(angle)
        u, v = (c * dx + s * dy) / radii[0], (c * dy - s * dx) / radii[1]
        r = np.sqrt(u * u + v * v)
        if lobes is None:
            return (r - 1) * min(radii)
        theta = np.arctan2(v, u)
        outline = 1 + sum(a * np.cos(k * theta + b) for k, (a, b) in enumerate(lobes, 2))
        return (r - outline) * min(radii)

    def paint(self, distance: np.ndarray, value: float | np.ndarray) -> None:
        """Cover where `distance` < 0, with a border about a pixel wide."""
        cover = np.clip(0.5 - distance / (2 * self.softness), 0, 1)
        self.values += cover * (value - self.values)


def draw_lobes(generator: np.random.Generator, amplitude: float, count: int = 3) -> np.ndarray:
    return np.stack(
        [generator.normal(0, amplitude, count) / np.arange(1, count + 1), generator.uniform(0, 6.3, count)], 1
    )


class Anatomy:
    """Every length (mm), angle and signal of one subject, drawn once."""

    def __init__(self, generator: np.random.Generator, disease: str) -> None:
        g = generator
        self.size = g.uniform(0.9, 1.1)
        self.chest = (g.uniform(150, 172) * self.size, g.uniform(108, 124) * self.size)
        self.fat = g.uniform(7, 18)
        self.chest_lobes = draw_lobes(g, 0.02)
        self.heart = np.array([g.uniform(18, 38), g.uniform(-18, 2)])
        self.lv_radius = g.uniform(23, 27) * self.size * (1.25 if disease == "LV" else 1.0)
        self.wall = g.uniform(8, 10) * (1.6 if disease == "HCM" else 1.0)
        self.rv_scale = g.uniform(0.9, 1.1) * (1.25 if disease in ("RV", "TRI", "FALL", "CIA") else 1.0)
        self.ejection = g.uniform(0.26, 0.36) * (0.45 if disease == "LV" else 1.0)
        self.length = g.uniform(80, 96) * self.size
        self.septum_angle = g.uniform(2.75, 3.25)  # direction from LV to RV, to the left of the picture
        self.lv_lobes, self.rv_lobes = draw_lobes(g, 0.02), draw_lobes(g, 0.03)
        self.papillary = [
            (g.uniform(0.3, 0.7), g.uniform(2.4, 3.6)),
            (g.uniform(2.2, 2.7), g.uniform(2.4, 3.6)),
        ]
        self.signal = {name: value * g.uniform(0.94, 1.06) for name, value in TISSUE.items()}
        self.liver_top = g.uniform(14, 28)
        self.vessels = g.uniform(-1, 1, (26, 3))
        self.trabeculae = g.uniform(-1, 1, (14, 3))
        self.bias = g.uniform(-0.10, 0.10, 2)
        self.pose = (g.uniform(-0.25, 0.25), g.uniform(-22, 12), g.uniform(-16, 20))
        self.apex_angle = g.uniform(0.65, 0.95)  # long-axis tilt in the four-chamber view


def draw_chest(canvas: Canvas, anatomy: Anatomy, level: float) -> None:
    """Background of a slice at `level` from -1 (head side) to 1 (feet side)."""
    a, signal = anatomy, anatomy.signal
    width, depth = a.chest[0] * (1 - 0.03 * level), a.chest[1] * (1 - 0.02 * level)
    body = canvas.ellipse((0, 0), (width, depth), 0, a.chest_lobes)
    canvas.paint(body, signal["fat"])
    canvas.paint(body + a.fat, signal["muscle"])
    for i in range(14):  # ribs, cut obliquely
        angle = 2 * np.pi * (i + 0.5) / 14 + 0.12 * level
        center = (0.86 * (width - a.fat) * np.cos(angle), 0.86 * (depth - a.fat) * np.sin(angle))
        rib = canvas.ellipse(center, (9, 4.5), angle + np.pi / 2)
        canvas.paint(rib, signal["bone"])
        canvas.paint(rib + 1.8, signal["marrow"])
    inner = canvas.ellipse((0, 0), (width - a.fat - 20, depth - a.fat - 17), 0, a.chest_lobes)
    canvas.paint(inner, signal["fat"] * 0.55)  # mediastinum
    for side in (-1, 1):
        lung = canvas.ellipse(
            (side * 0.47 * width, -4), (0.36 * width, 0.66 * depth), side * 0.12, a.chest_lobes
        )
        lung = np.maximum(lung, inner + 2)
        canvas.paint(lung, signal["lung"])
        for u, v, size in (
            a.vessels[:13] if side < 0 else a.vessels[13:]
        ):  # lung vessels, moving with the level
            center = (side * (0.45 + 0.2 * u) * width, (0.45 * v + 0.08 * level * size) * depth)
            canvas.paint(
                np.maximum(canvas.ellipse(center, (2.2 + size, 2.2 + size)), lung + 2), signal["vessel"] * 0.6
            )
    draw_abdomen(canvas, a, level, width, depth, inner)
    spine = (0.0, 0.68 * depth)
    canvas.paint(canvas.ellipse(spine, (19, 15)), signal["bone"])
    canvas.paint(canvas.ellipse(spine, (17, 13)), signal["marrow"])
    canvas.paint(canvas.ellipse((0, spine[1] + 21), (8, 6)), signal["cord"])
    for side in (-1, 1):
        canvas.paint(canvas.ellipse((side * 34, 0.74 * depth), (22, 12), side * -0.3), signal["muscle"] * 1.1)
    aorta = canvas.ellipse((19, 0.44 * depth), (11, 11))
    canvas.paint(aorta - 1.5, signal["muscle"])
    canvas.paint(aorta, signal["blood"])


def draw_abdomen(
    canvas: Canvas, a: Anatomy, level: float, width: float, depth: float, inner: np.ndarray
) -> None:
    """The dome of the liver and the spleen with the stomach's gas rise into the slice towards the feet."""
    rise = level + 0.35
    if rise <= 0:
        return
    reach = min(1.0, 0.45 + 0.5 * rise)
    liver = canvas.ellipse(
        (-0.42 * width, a.liver_top), (0.44 * width * reach, 0.62 * depth * reach), -0.15, a.chest_lobes
    )
    liver = np.maximum(liver, inner + 1.5)
    canvas.paint(liver, a.signal["liver"])
    for u, v, size in a.vessels[:9]:
        center = (-0.42 * width + 0.28 * u * width * reach, a.liver_top + 0.4 * v * depth * reach)
        vein = canvas.ellipse(center, (3.6 + 2 * size, 2.4 + size), 3 * v)
        canvas.paint(np.maximum(vein, liver + 3), a.signal["vessel"])
    spleen = np.maximum(
        canvas.ellipse((0.56 * width, 0.24 * depth), (26 * reach, 36 * reach), 0.3), inner + 1.5
    )
    canvas.paint(spleen, a.signal["spleen"])


def heart_state(a: Anatomy, contraction: float) -> tuple[float, float]:
    """(cavity radius, wall) in mm at `contraction` 0 (ED) to 1 (ES); the wall's area in the slice is kept."""
    cavity = a.lv_radius * (1 - a.ejection * contraction)
    area = (a.lv_radius + a.wall) ** 2 - a.lv_radius**2
    return cavity, np.sqrt(cavity**2 + area) - cavity


def draw_short_axis(canvas: Canvas, a: Anatomy, place: float, contraction: float) -> np.ndarray:
    """Paint the heart at `place` from 0 (base) to 1 (apex); returns the class map."""
    signal, labels = a.signal, np.zeros(canvas.shape, np.uint8)
    if place > 1.02:
        return labels
    taper = np.sqrt(max(0.02, 1 - (0.95 * place) ** 2.4))
    cavity, wall = heart_state(a, contraction)
    cavity, wall = cavity * taper, wall * (0.75 + 0.25 * taper)
    center = a.heart + np.array([6.0, 4.0]) * place
    direction = np.array([np.cos(a.septum_angle), np.sin(a.septum_angle)])
    outer = cavity + wall
    epicardium = canvas.ellipse(tuple(center), (outer, outer * 0.96), 0.3, a.lv_lobes)
    endocardium = canvas.ellipse(tuple(center), (cavity, cavity * 0.96), 0.3, a.lv_lobes)
    rv_reach = a.rv_scale * (1 - 0.22 * contraction) * max(0.0, 1 - 1.05 * place**1.6)
    rv_center = center + direction * (0.75 * outer)
    rv_radii = (max(1.0, outer * (0.4 + 0.72 * rv_reach)), max(1.0, outer * (0.4 + 0.6 * rv_reach)))
    ventricle = canvas.ellipse(tuple(rv_center), rv_radii, a.septum_angle, a.rv_lobes)
    pericardium = np.minimum(ventricle - 4.5, epicardium - 2.5)
    canvas.paint(pericardium - 3.5, signal["fat"])
    canvas.paint(pericardium, signal["muscle"] * 0.9)
    has_rv = rv_reach > 0.12
    if has_rv:
        canvas.paint(ventricle, signal["blood"] * 0.96)
        for u, v, size in a.trabeculae:
            spot = (
                rv_center
                + direction * (0.75 * u * rv_radii[0])
                + np.array([-direction[1], direction[0]]) * (v * rv_radii[1])
            )
            canvas.paint(
                np.maximum(canvas.ellipse(tuple(spot), (2.2 + size, 1.6 + 0.5 * size), v), ventricle + 1),
                0.55,
            )
    canvas.paint(epicardium, signal["myocardium"])
    canvas.paint(endocardium, signal["blood"])
    for angle, size in a.papillary:
        if 0.15 < place < 0.8:
            spot = center + 0.72 * cavity * np.array([np.cos(angle), np.sin(angle)])
            muscle = canvas.ellipse(tuple(spot), (size * taper * (1 + 0.4 * contraction),) * 2)
            canvas.paint(np.maximum(muscle, endocardium + 0.5), signal["myocardium"] * 1.1)
    if has_rv:
        labels[ventricle < 0] = 3
    labels[epicardium < 0] = 2
    labels[endocardium < 0] = 1
    return labels


def draw_long_axis(canvas: Canvas, a: Anatomy, contraction: float) -> np.ndarray:
    """Paint the four-chamber view; returns the class map. The atria are blood without a class."""
    signal, labels = a.signal, np.zeros(canvas.shape, np.uint8)
    cavity, wall = heart_state(a, contraction)
    length = a.length * (1 - 0.14 * contraction)
    axis = np.array([np.cos(a.apex_angle), -np.sin(a.apex_angle)])  # base -> apex: to the right, upwards
    across = np.array([-axis[1], axis[0]])  # towards the lateral wall
    base = a.heart + np.array([-16.0, 22.0]) + 10 * contraction * axis * 0.5
    along = (canvas.x - base[0]) * axis[0] + (canvas.y - base[1]) * axis[
        1
    ]  # mm from the valve plane to the apex
    aside = (canvas.x - base[0]) * across[0] + (canvas.y - base[1]) * across[1]

    def chamber(half_width: float, reach: float, shift: float) -> np.ndarray:
        """Half an ellipsoid from the valve plane to `reach`."""
        r = np.sqrt((along / reach) ** 2 + ((aside - shift) / half_width) ** 2)
        return np.maximum((r - 1) * min(half_width, reach), -along)

    endocardium, epicardium = chamber(cavity, length - wall, 0.0), chamber(cavity + wall, length, 0.0)
    rv_width = 21 * a.rv_scale * a.size * (1 - 0.25 * contraction)
    ventricle = chamber(rv_width + 12, 0.84 * length, -(cavity + wall + 0.25 * rv_width))
    pericardium = np.minimum(ventricle - 4.0, epicardium - 2.0)
    grow = 1 + 0.25 * contraction
    left = canvas.ellipse(tuple(base - axis * 21 * grow + across * 2), (24 * grow, 20 * grow), -a.apex_angle)
    right = canvas.ellipse(
        tuple(base - axis * 17 * grow - across * 52), (23 * grow, 20 * grow), -a.apex_angle
    )
    atria = np.minimum(left, right)
    canvas.paint(np.minimum(pericardium, atria) - 3.5, signal["fat"])
    canvas.paint(np.minimum(pericardium, atria - 2), signal["muscle"] * 0.9)
    canvas.paint(atria, signal["blood"] * 0.97)
    canvas.paint(ventricle, signal["blood"] * 0.96)
    for u, v, size in a.trabeculae:
        spot = base + axis * length * (0.4 + 0.3 * u) - across * (cavity + wall + rv_width * (0.7 + 0.3 * v))
        canvas.paint(np.maximum(canvas.ellipse(tuple(spot), (2.4 + size, 1.6), v), ventricle + 1), 0.55)
    canvas.paint(epicardium, signal["myocardium"])
    canvas.paint(endocardium, signal["blood"])
    labels[ventricle < 0] = 3
    labels[epicardium < 0] = 2
    labels[endocardium < 0] = 1
    return labels


def finish(values: np.ndarray, a: Anatomy, vendor: str, generator: np.random.Generator) -> np.ndarray:
    """Coil shading, the scanner's contrast and Rician noise; int16 in the vendor's scale."""
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


def contraction_of(frame: int, num_frames: int) -> float:
    """0 at frame 0 (end-diastole), 1 at the middle frame (end-systole)."""
    return float(np.sin(np.pi * frame / num_frames) ** 2)


def save(path: Path, array: np.ndarray, spacing: tuple[float, ...], affine: np.ndarray) -> None:
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_zooms((*spacing, 1.0)[: array.ndim])
    image.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(compressed(image))


def compressed(image: nibabel.Nifti1Image) -> bytes:
    import gzip

    return gzip.compress(image.to_bytes(), 1, mtime=0)


def cine(
    view: str, shape: tuple[int, int, int], spacing: tuple[float, float, float], a: Anatomy, vendor: str,
    num_frames: int, generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Images (X, Y, Z, T) int16 and class maps (X, Y, Z, T) uint8 of one view."""
    width, height, depth = shape
    images = np.empty((*shape, num_frames), np.int16)
    labels = np.zeros((*shape, num_frames), np.uint8)
    for z in range(depth):
        place = (
            (z - 0.5) * spacing[2] / a.length if view == "SA" else 0.4
        )  # one slice may lie beyond base and apex
        background = Canvas((height, width), (spacing[1], spacing[0]), a.pose)
        draw_chest(background, a, 1.6 * place - 0.7)
        for frame in range(num_frames):
            canvas, beat = background.copy(), contraction_of(frame, num_frames)
            if view == "LA":
                classes = draw_long_axis(canvas, a, beat)
            elif place < 0:  # above the valve: an atrium
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
    """Write one subject; returns its row of dataset_information.csv. `image_size` is the typical matrix, in
    pixels.
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
        save(folder / f"{name}_{view}_CINE.nii.gz", images, spacing, affine)
        for phase, frame in (("ED", 0), ("ES", 2)):
            save(folder / f"{name}_{view}_{phase}.nii.gz", images[..., frame], spacing, affine)
            save(folder / f"{name}_{view}_{phase}_gt.nii.gz", labels[..., frame], spacing, affine)
    scanner, field = VENDORS[vendor][:2]
    return {"SUBJECT_CODE": number, "DISEASE": disease, "VENDOR": vendor, "SCANNER": scanner, "FIELD": field}


def write_mnms2(
    root: str | Path, *, num_subjects: int, seed: int = 0, image_size: int = 256,
    num_slices: tuple[int, int] = (8, 12), progress: Progress = lambda: None,
) -> Path:  # fmt: skip
    """Subjects 001.. with SA and LA, ED and ES, class maps and CINE, and dataset_information.csv. Returns the
    root.
    """
    root = Path(root)
    check(num_subjects, image_size)
    rows = []
    for number in range(1, num_subjects + 1):
        rows.append(write_mnms2_subject(root, number, seed, image_size, tuple(num_slices)))
        progress()
    with replacing(root / "dataset_information.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return root


def write_folder(
    root: str | Path, *, num_subjects: int, seed: int = 0, image_size: int = 64,
    num_slices: tuple[int, int] = (40, 56), progress: Progress = lambda: None,
) -> Path:  # fmt: skip
    """3D torso volumes in HU, `images/` and `masks/` (1 lung, 2 liver, 3 heart, 4 spine). Returns the root.

    `num_slices` bounds the number of axial slices; matrix and spacing vary a little about `image_size`.
    """
    root = Path(root)
    check(num_subjects, image_size)
    for number in range(1, num_subjects + 1):
        generator = np.random.default_rng((seed, number))
        image, mask, spacing = torso(generator, image_size, tuple(num_slices))
        affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
        name = f"subject_{number:03d}.nii.gz"
        save(root / "images" / name, image, spacing, affine)
        save(root / "masks" / name, mask, spacing, affine)
        progress()
    return root


def check(num_subjects: int, image_size: int) -> None:
    if num_subjects < 1:
        raise InputError(f"num_subjects={num_subjects}: give 1 or more")
    if image_size < 16:
        raise InputError(f"image_size={image_size}: give 16 pixels or more")


def torso(
    g: np.random.Generator, image_size: int, num_slices: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """(X, Y, Z) int16 HU, class map uint8 and spacing in mm."""
    width = round(image_size * g.uniform(0.92, 1.08))
    shape = (width, round(width * g.uniform(0.8, 0.95)), int(g.integers(num_slices[0], num_slices[1] + 1)))
    spacing = (380 / width, 380 / width, 320 / shape[2])
    x, y, z = np.meshgrid(
        *((np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)),
        indexing="ij",
        sparse=True,
    )
    hu, mask = np.full(shape, -1000.0, np.float32), np.zeros(shape, np.uint8)

    def organ(
        center: tuple, radii: tuple, value: float, label: int | None = None, within: np.ndarray | None = None
    ) -> np.ndarray:
        """An ellipsoid in mm, jittered by a few per cent; painted where `within` holds."""
        centers, sizes = np.array(center) + g.normal(0, 3, 3), np.array(radii) * g.uniform(0.92, 1.08, 3)
        r = sum(((axis - c) / s) ** 2 for axis, c, s in zip((x, y, z), centers, sizes, strict=True))
        inside = r < 1 if within is None else (r < 1) & within
        hu[inside] = value * g.uniform(0.95, 1.05)
        if label is not None:
            mask[inside] = label
        return inside

    body = organ((0, 0, 0), (165, 118, 400), -95)
    muscle = organ((0, 0, 0), (148, 102, 390), 55, within=body)
    for side in (-1, 1):
        organ((side * 68, -5, 45), (52, 76, 110), -820, 1, muscle)
    organ((-52, -2, -85), (80, 74, 62), 105, 2, muscle)
    organ((22, -32, 20), (45, 38, 46), 160, 3, muscle)
    organ((0, 74, 0), (21, 19, 400), 420, 4, muscle)
    hu = ndimage.gaussian_filter(hu, 0.5) + g.normal(0, 12, shape).astype(np.float32)
    return np.rint(hu).astype(np.int16), mask, spacing


PHANTOMS = {"mnms2": write_mnms2, "folder": write_folder}
