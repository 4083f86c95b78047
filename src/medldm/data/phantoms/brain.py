"""Synthetic brains: folded cortex, ventricles, deep nuclei, cerebellum, and a tumour that each contrast shows
differently, in the layouts of BraTS and IXI.
"""

from pathlib import Path

import numpy as np

from medldm.data.phantoms.files import Progress, save_rows
from medldm.data.phantoms.scene import Scene, check_volume_request

CONTRASTS = ("t1", "t1ce", "t2", "flair", "pd")
# Relative signals in the order of CONTRASTS: t1 is a spin echo, t1ce inversion-prepared with contrast agent.
SIGNAL = {
    "csf": (0.40, 0.10, 1.00, 0.14, 0.85), "grey": (0.66, 0.46, 0.62, 0.62, 0.80),
    "white": (0.70, 0.84, 0.44, 0.50, 0.64), "nuclei": (0.68, 0.60, 0.50, 0.54, 0.70),
    "vessel": (0.20, 1.30, 0.15, 0.20, 0.30), "necrosis": (0.46, 0.16, 0.86, 0.46, 0.82),
    "enhancing": (0.60, 1.30, 0.70, 0.76, 0.78), "oedema": (0.58, 0.40, 0.84, 0.92, 0.84),
    "fat": (1.00, 1.00, 0.80, 0.75, 0.90), "bone": (0.08, 0.08, 0.06, 0.06, 0.07),
    "muscle": (0.55, 0.46, 0.25, 0.32, 0.50), "eye": (0.36, 0.16, 1.00, 0.20, 0.85),
}  # fmt: skip
EXTENT = {"brats": (160.0, 200.0, 150.0), "ixi": (190.0, 230.0, 200.0)}
CENTER = {"brats": 0.0, "ixi": -12.0}


def draw_head(scene: Scene, tissue: dict) -> None:
    """Draws scalp, skull and eyes, which BraTS strips and IXI keeps."""
    head = scene.ellipsoid((0, 2, -4), (79, 98, 92), jitter=0.02)
    scene.paint(np.minimum(head, scene.ellipsoid((0, 20, -80), (56, 62, 60))), tissue["muscle"])
    scene.paint(head, tissue["fat"])
    scene.paint(head + 6, tissue["bone"])
    scene.paint(head + 11, tissue["muscle"])  # the skull base and the face; the brain is painted over it
    scene.paint(np.maximum(head + 11, -scene.points[2] - 36), tissue["csf"])
    for side in (-1, 1):
        scene.paint(scene.ellipsoid((side * 31, -82, -30), (13, 13, 13)), tissue["eye"])


def draw_brain(scene: Scene, tissue: dict) -> np.ndarray:
    """Draws cerebrum, cerebellum and brain stem. Returns the distance to the whole brain."""
    brain = scene.ellipsoid((0, 0, 8), (67, 84, 62), jitter=0.03)
    flat = np.maximum(brain, -scene.points[2] - 34)  # the base of the brain
    cerebellum = scene.ellipsoid((0, 46, -36), (47, 29, 25))
    stem = scene.tube([(0, 12, -18), (0, 20, -42), (0, 26, -72)], 12)
    whole = np.minimum(np.minimum(flat, cerebellum), stem)
    scene.paint(whole - 1, tissue["csf"])
    # Folds: a band-limited field shifts the border between fluid, cortex and white matter. On a coarse grid
    # only the larger folds are drawn, since finer ones would look like noise.
    folds = scene.waves(4.2, max(19.0, 4.5 * max(scene.spacing)), 10)
    fissure = np.abs(scene.points[0]) - 1.6 + 0.12 * np.maximum(62 - scene.points[2] - 20, 0)
    cortex = np.maximum(flat + 2.5 + np.maximum(folds, -1.5), -fissure)
    scene.paint(cortex, tissue["grey"], within=flat)
    scene.paint(cortex + 3.4 + 0.5 * folds, tissue["white"], within=flat + 4)
    scene.paint(scene.ellipsoid((0, 0, 18), (19, 36, 7), (0.05, 0, 0)), tissue["white"])  # corpus callosum
    leaves = 1.5 * np.sin(scene.points[2] * 1.1 + 0.4 * scene.points[1])
    scene.paint(cerebellum + 1.5, tissue["grey"])
    scene.paint(cerebellum + 8 + leaves, tissue["white"])
    scene.paint(stem, tissue["white"])
    for side in (-1, 1):
        scene.paint(scene.ellipsoid((side * 12, 8, 6), (9, 15, 9), (0, 0, -0.3 * side)), tissue["nuclei"])
        scene.paint(scene.ellipsoid((side * 26, -6, 4), (6, 18, 11), (0, 0, 0.25 * side)), tissue["nuclei"])
        draw_ventricle(scene, tissue, side)
    scene.paint(scene.ellipsoid((0, 6, 4), (2.2, 14, 8)), tissue["csf"])  # third ventricle
    scene.paint(scene.ellipsoid((0, 38, -32), (6, 5, 8)), tissue["csf"])  # fourth ventricle
    sinus = [(0, -78, 30), (0, -45, 62), (0, 0, 70), (0, 45, 60), (0, 82, 18)]
    scene.paint(scene.tube(sinus, 3.0), tissue["vessel"], within=whole - 1)
    return whole


def draw_ventricle(scene: Scene, tissue: dict, side: int) -> None:
    width = scene.generator.uniform(3.6, 7.0)
    body = [(side * 9, -34, 10), (side * 8, -10, 17), (side * 11, 16, 18), (side * 22, 34, 6)]
    horns = [(side * 22, 34, 6), (side * 30, 18, -10), (side * 33, -4, -17)]
    ends = [(side * 22, 34, 6), (side * 17, 54, 6)]
    scene.paint(scene.tube(body, width), tissue["csf"])
    scene.paint(scene.tube(horns, 0.5 * width), tissue["csf"])
    scene.paint(scene.tube(ends, 0.7 * width), tissue["csf"])
    # head of the caudate nucleus
    scene.paint(scene.ellipsoid((side * 15, -24, 13), (4.5, 11, 8)), tissue["nuclei"])


def draw_tumour(scene: Scene, tissue: dict, whole: np.ndarray) -> None:
    """Draws a tumour in the white matter of one side, with the classes oedema 2, enhancing rim 4
    and core 1.
    """
    g = scene.generator
    side, radius = g.choice((-1, 1)), g.uniform(11, 21)
    center = (side * g.uniform(24, 38), g.uniform(-42, 42), g.uniform(-2, 34))
    rough = scene.waves(0.16 * radius, 26.0, 5)
    ball = scene.ellipsoid(center, radius * g.uniform(0.8, 1.2, 3)) + rough
    fingers = scene.ellipsoid(center, radius * g.uniform(1.5, 1.9, 3)) + scene.waves(0.35 * radius, 24.0, 6)
    inside = whole + 5
    scene.paint(np.minimum(fingers, ball), tissue["oedema"], 2, within=inside)
    scene.paint(ball, tissue["enhancing"], 4, within=inside)
    scene.paint(ball + radius * g.uniform(0.22, 0.4) + 0.6 * rough, tissue["necrosis"], 1, within=inside)


def brain(
    size: tuple[int, ...], generator: np.random.Generator, *, kind: str = "brats"
) -> tuple[Scene, dict[str, np.ndarray]]:
    """Returns a scene and one int16 image for each contrast. Brains of the kind BraTS are skull-stripped and
    have a tumour, those of IXI keep the head.

    Each contrast has its own bias field, grey scale and noise; everything else follows from the tissue.
    """
    scene = Scene(size, EXTENT[kind], CONTRASTS, generator, center=(0, 0, CENTER[kind]), warp=2.2)
    spread = generator.uniform(0.97, 1.03, (len(SIGNAL), len(CONTRASTS)))
    tissue = {name: np.array(v) * s for (name, v), s in zip(SIGNAL.items(), spread, strict=True)}
    if kind == "ixi":
        draw_head(scene, tissue)
    whole = draw_brain(scene, tissue)
    if kind == "brats":
        draw_tumour(scene, tissue, whole)
    images = {}
    for name, values in zip(CONTRASTS, scene.values, strict=True):
        values = values * scene.bias(0.07) * (1 + scene.texture(0.015, 2.5))
        # Rician noise, which is Gaussian far from zero
        values = np.abs(values + generator.normal(0, 0.015, size))
        values = np.where(whole < 0, values, 0) if kind == "brats" else values
        images[name] = np.rint(values * generator.uniform(500, 900)).astype(np.int16)
    return scene, images


def write_brats(
    root: str | Path, *, num_subjects: int, seed: int = 0, size: tuple[int, ...] = (96, 120, 90),
    progress: Progress = lambda: None,
) -> Path:  # fmt: skip
    """Writes `BraTS2021_00000/BraTS2021_00000_{t1,t1ce,t2,flair,seg}.nii.gz`... Returns the root."""
    root, size = Path(root), check_volume_request(num_subjects, size)
    for number in range(num_subjects):
        scene, images = brain(size, np.random.default_rng((seed, number)))
        name = f"BraTS2021_{number:05d}"
        for key in ("t1", "t1ce", "t2", "flair"):
            scene.save(root / name / f"{name}_{key}.nii.gz", images[key])
        scene.save(root / name / f"{name}_seg.nii.gz", scene.labels)
        progress()
    return root


def write_ixi(
    root: str | Path, *, num_subjects: int, seed: int = 0, size: tuple[int, ...] = (96, 116, 100),
    progress: Progress = lambda: None,
) -> Path:  # fmt: skip
    """Writes `output/IXI002-Guys-0800/{T1w,T2,PD}.nii.gz`... with `train_subs.csv` and `test_subs.csv`. A
    fifth of the subjects, and at least one of two, are for testing.
    """
    root, size = Path(root), check_volume_request(num_subjects, size)
    names = [f"IXI{2 + k:03d}-Guys-{800 + k:04d}" for k in range(num_subjects)]
    for number, name in enumerate(names):
        scene, images = brain(size, np.random.default_rng((seed, number)), kind="ixi")
        for key, file in (("t1", "T1w"), ("t2", "T2"), ("pd", "PD")):
            scene.save(root / "output" / name / f"{file}.nii.gz", images[key])
        progress()
    num_val = num_test = max(1, num_subjects // 5) if num_subjects > 2 else 0
    parts = {
        "train": names[: num_subjects - num_val - num_test],
        "val": names[num_subjects - num_val - num_test : num_subjects - num_test],
        "test": names[num_subjects - num_test :],
    }
    for split, members in parts.items():
        if members:
            save_rows(root / f"{split}_subs.csv", [{"subject_id": name} for name in members])
    return root


BRAIN_PHANTOMS = {"brats": write_brats, "ixi": write_ixi}
