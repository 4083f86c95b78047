"""Draws trunks of the body: a torso as CT with some twenty organs, a pelvis as MR and CT, and a breast as MR,
in the layouts of AutoPET, TotalSegmentator MRI, SynthRAD2023 and Duke Breast.
"""

from pathlib import Path

import numpy as np

from medldm.data.phantoms.files import Progress
from medldm.data.phantoms.scene import Scene, check_volume_request

CHANNELS = ("ct", "mr")
TORSO_SIGNAL = {  # HU, and relative T1-weighted signal
    "air": (-1000, 0.01), "skin": (20, 0.45), "fat": (-100, 0.95), "muscle": (55, 0.38), "bone": (700, 0.08),
    "spongy": (250, 0.62), "disc": (90, 0.3), "lung": (-840, 0.06), "blood": (45, 0.15), "liver": (62, 0.55),
    "spleen": (52, 0.33), "kidney": (38, 0.42), "stomach": (28, 0.4), "gas": (-900, 0.02), "gut": (32, 0.42),
    "pancreas": (42, 0.58), "bile": (8, 0.25), "urine": (6, 0.16), "cord": (35, 0.5), "heart": (46, 0.35),
    "gland": (35, 0.45), "vessel": (130, 1.1),
}  # fmt: skip
# Class numbers of the 30 structures that Med-LSDM uses (medldm.data.datasets.totalsegmentator_mri.CLASSES).
KIDNEY, TORSO_VESSELS, GALLBLADDER, LIVER, STOMACH, PANCREAS, ADRENAL, LUNG, VERTEBRAE, ESOPHAGUS = range(
    1, 11
)
TRACHEA, HEART, PULMONARY, SMALL_BOWEL, DUODENUM, COLON, RIBS, HUMERUS, SCAPULA, CLAVICULA = range(11, 21)
FEMUR, HIP, SACRUM, AUTOCHTHON, ILIOPSOAS, BLADDER, SKIN, SPLEEN, FAT, MUSCLE = range(21, 31)
# z in mm: 0 is the dome of the liver; shoulders near 210, the pelvic floor near -330
TORSO_REGIONS = {  # the extent (x, y, z) and the centre of the field of view
    "torso": ((430.0, 320.0, 560.0), (0.0, 0.0, -60.0)),
    "pelvis": ((430.0, 320.0, 250.0), (0.0, 0.0, -265.0)),
}


def width_at(z: np.ndarray) -> np.ndarray:
    """Half the width of the body in mm at a height z: shoulders, waist, hips."""
    return np.interp(z, [-400, -290, -160, -60, 80, 170, 215, 260], [165, 178, 150, 152, 165, 178, 150, 60])


def draw_body(scene: Scene, tissue: dict) -> tuple[np.ndarray, np.ndarray]:
    """Paints skin, fat and the muscular wall. Returns the distances to the body and to the cavity within."""
    g, (x, y, z) = scene.generator, scene.points
    stout = g.uniform(0.9, 1.1)
    half = width_at(z).astype(np.float32) * np.float32(stout)
    deep = 0.64 * half * np.float32(g.uniform(0.93, 1.07))
    body = (np.sqrt((x / half) ** 2 + (np.abs(y) / deep) ** 2.4) - 1) * deep
    scene.paint(body, tissue["skin"], SKIN)
    scene.paint(body + 3, tissue["fat"], FAT)
    wall = body + g.uniform(12, 24)
    scene.paint(wall, tissue["muscle"], MUSCLE)
    cavity = np.maximum(wall + 13, y - 48)
    scene.paint(cavity, tissue["fat"], FAT)
    return body, cavity


def draw_spine(scene: Scene, tissue: dict) -> None:
    x, y, z = scene.points
    column = scene.ellipsoid((0, 62, 0), (21, 17, 4000), jitter=0.02)
    for side in (-1, 1):
        scene.paint(
            scene.ellipsoid((side * 32, 92, 0), (24, 17, 4000), jitter=0.02), tissue["muscle"], AUTOCHTHON
        )
    gap = np.sin(2 * np.pi * z / 33.0) - 0.72
    scene.paint(column, tissue["disc"])
    scene.paint(np.maximum(column, 6 * gap), tissue["bone"], VERTEBRAE)
    scene.paint(np.maximum(column + 4, 6 * gap + 3), tissue["spongy"], VERTEBRAE)
    arch = np.maximum(scene.ellipsoid((0, 92, 0), (9, 18, 4000), jitter=0.02), 6 * gap)
    scene.paint(arch, tissue["bone"], VERTEBRAE)
    scene.paint(scene.ellipsoid((0, 86, 0), (8, 7, 4000), jitter=0.02), tissue["cord"])


def draw_torso_chest(scene: Scene, tissue: dict, body: np.ndarray, cavity: np.ndarray) -> None:
    x, y, z = scene.points
    thorax = np.maximum(np.maximum(body + 30, -z - 70), z - 205)
    slope = (z + 0.45 * y + 0.0008 * x * x) / 25.0  # ribs run down to the front
    ribs = np.maximum(np.abs(body + 26) - 4.5, 9 * (0.72 - np.sin(2 * np.pi * slope)))
    scene.paint(np.maximum(np.maximum(ribs, -z - 85), z - 200), tissue["bone"], RIBS)
    scene.paint(scene.ellipsoid((0, -86, 90), (18, 6, 80)), tissue["bone"], within=body + 10)
    for side in (-1, 1):
        lung = np.maximum(scene.ellipsoid((side * 72, 4, 62), (58, 78, 122)), thorax)
        base = np.maximum(lung, -z + 12 - 0.004 * (x - side * 72) ** 2)
        scene.paint(base, tissue["lung"], LUNG)
        branch = [(side * 18, 6, 105), (side * 50, 10, 80), (side * 80, 24, 40)]
        scene.paint(scene.tube(branch, 5.5), tissue["blood"], within=base)
        scene.paint(
            scene.tube([branch[1], (side * 84, -20, 70), (side * 100, -30, 95)], 3.5),
            tissue["blood"],
            within=base,
        )
        scene.paint(
            scene.tube([(side * 12, -72, 188), (side * 150, -20, 205)], 6.5), tissue["bone"], CLAVICULA
        )
        blade = scene.ellipsoid((side * 112, 82, 125), (42, 7, 62), (0, 0, -0.5 * side))
        scene.paint(blade, tissue["bone"], SCAPULA, within=body + 8)
        scene.paint(
            scene.ellipsoid((side * 158, 8, 190), (21, 21, 24)), tissue["bone"], HUMERUS, within=body + 5
        )
    heart = scene.ellipsoid((24, -34, 42), (56, 44, 50), (0.2, 0.5, 0.5))
    scene.paint(heart - 4, tissue["fat"], within=thorax)
    scene.paint(heart, tissue["heart"], HEART)
    for offset in ((34, -30, 36), (8, -48, 46)):
        scene.paint(scene.ellipsoid(offset, (21, 17, 26), (0.2, 0.5, 0.4)), tissue["blood"], HEART)
    scene.paint(scene.tube([(12, -36, 84), (26, -18, 102), (40, 10, 108)], 12), tissue["blood"], PULMONARY)
    arch = [(8, -32, 84), (4, -34, 122), (16, 10, 138), (24, 40, 118), (20, 40, 0), (8, 36, -120)]
    scene.paint(scene.tube(arch, 12.5), tissue["blood"], TORSO_VESSELS)
    scene.paint(scene.tube([(0, 30, 260), (2, 34, 100), (8, 22, -10)], 7), tissue["muscle"], ESOPHAGUS)
    scene.paint(scene.tube([(0, 4, 260), (0, 14, 115)], 9), tissue["gas"], TRACHEA)
    for side in (-1, 1):
        scene.paint(scene.tube([(0, 14, 115), (side * 34, 18, 88)], 6.5), tissue["gas"], TRACHEA)


def draw_torso_abdomen(scene: Scene, tissue: dict, cavity: np.ndarray) -> None:
    x, y, z = scene.points
    coils = np.abs(scene.waves(1.0, 34.0, 6)) - 0.75
    scene.paint(
        np.maximum(scene.ellipsoid((0, -30, -185), (98, 58, 62)), 12 * coils),
        tissue["gut"],
        SMALL_BOWEL,
        within=cavity,
    )
    frame = [(-104, -6, -232), (-108, -4, -120), (-60, -62, -108), (40, -66, -112), (104, 2, -92),
             (106, 10, -210), (40, 12, -262), (6, 40, -290)]  # fmt: skip
    tube = scene.tube(frame, 20) + 4 * np.sin(2 * np.pi * (x + y + 1.3 * z) / 38.0)
    scene.paint(tube, tissue["gut"], COLON, within=cavity)
    scene.paint(np.maximum(tube + 7, y + 8), tissue["gas"], COLON, within=cavity)
    liver = np.maximum(scene.ellipsoid((-58, -6, -48), (92, 78, 64), (0, 0.18, 0)), -(x - 62) * -1.0)
    under = np.maximum(liver, -(z + 105 + 0.35 * (x + 58)))
    scene.paint(under, tissue["liver"], LIVER, within=cavity - 8)
    for path in ([(-20, 20, -66), (-60, 4, -44), (-96, -8, -28)], [(-14, 24, -20), (-54, 10, -20)]):
        scene.paint(scene.tube(path, 4.5), tissue["blood"], within=under + 6)
    scene.paint(scene.ellipsoid((-46, -56, -98), (14, 14, 30), (0.3, 0, 0)), tissue["bile"], GALLBLADDER)
    scene.paint(
        scene.ellipsoid((98, 38, -48), (26, 40, 50), (0.3, 0, 0)), tissue["spleen"], SPLEEN, within=cavity - 9
    )
    stomach = scene.ellipsoid((50, -26, -56), (42, 36, 54), (0, 0.5, 0.2))
    scene.paint(stomach, tissue["stomach"], STOMACH, within=cavity - 4)
    scene.paint(np.maximum(stomach + 6, y + 34), tissue["gas"], STOMACH, within=cavity)
    scene.paint(
        scene.tube([(-30, -4, -112), (4, -14, -100), (70, 16, -78)], 12), tissue["pancreas"], PANCREAS
    )
    loop = [(-18, -30, -88), (-44, -4, -98), (-42, 0, -132), (0, 12, -138)]
    scene.paint(scene.tube(loop, 12), tissue["gut"], DUODENUM)
    for side in (-1, 1):
        psoas = [(side * 30, 50, -100), (side * 48, 36, -200), (side * 72, -10, -285), (side * 74, 12, -330)]
        scene.paint(scene.tube(psoas, 19), tissue["muscle"], ILIOPSOAS)
        kidney = scene.ellipsoid((side * 66, 48, -108 + 8 * side), (29, 26, 55), (0, 0.15 * side, 0.4 * side))
        hilum = scene.ellipsoid((side * 46, 40, -108 + 8 * side), (15, 11, 22))
        scene.paint(kidney, tissue["kidney"], KIDNEY)
        scene.paint(hilum, tissue["fat"], FAT)
        scene.paint(
            scene.ellipsoid((side * 44, 40, -58), (13, 6, 13), (0, 0.5 * side, 0)), tissue["spleen"], ADRENAL
        )
        legs = [(side * 5, 38, -180), (side * 46, 28, -258), (side * 70, -24, -330)]
        scene.paint(scene.tube(legs, 6.5), tissue["blood"], TORSO_VESSELS)
    scene.paint(scene.tube([(14, 38, -60), (10, 38, -185)], 10), tissue["blood"], TORSO_VESSELS)
    scene.paint(scene.tube([(-18, 36, 10), (-16, 40, -185)], 11), tissue["blood"], TORSO_VESSELS)


def draw_pelvis(scene: Scene, tissue: dict, body: np.ndarray) -> None:
    for side in (-1, 1):
        blade = scene.ellipsoid((side * 92, 36, -222), (56, 70, 66), (0.3, 0.5 * side, 0.5 * side))
        shell = np.maximum(np.abs(blade) - 6.5, scene.ellipsoid((side * 112, 30, -216), (60, 74, 58)))
        ring = scene.tube([(side * 96, 18, -268), (side * 60, -26, -300), (side * 10, -44, -312)], 11)
        sit = scene.tube([(side * 94, 22, -270), (side * 74, 44, -320), (side * 34, -20, -334)], 13)
        socket = scene.ellipsoid((side * 98, 10, -278), (33, 33, 33), jitter=0.02)
        for part in (shell, ring, sit, socket):
            scene.paint(part, tissue["bone"], HIP, within=body + 12)
            scene.paint(part + 4, tissue["spongy"], HIP, within=body + 16)
        scene.paint(scene.ellipsoid((side * 102, 10, -280), (26, 26, 26), jitter=0.02), tissue["muscle"])
        neck = scene.tube([(side * 102, 10, -280), (side * 150, 14, -310), (side * 148, 14, -420)], 16)
        head = np.minimum(scene.ellipsoid((side * 102, 10, -280), (24, 24, 24), jitter=0.02), neck)
        scene.paint(head, tissue["bone"], FEMUR)
        scene.paint(head + 5, tissue["spongy"], FEMUR)
    sacrum = scene.ellipsoid((0, 74, -225), (52, 20, 58), (0.35, 0, 0))
    scene.paint(sacrum, tissue["bone"], SACRUM)
    scene.paint(sacrum + 5, tissue["spongy"], SACRUM)
    rectum = scene.tube([(6, 44, -250), (0, 56, -290), (0, 46, -340)], 17)
    scene.paint(rectum, tissue["gut"], COLON)
    scene.paint(rectum + 9, tissue["gas"], COLON)
    scene.paint(scene.ellipsoid((0, 18, -318), (26, 20, 18)), tissue["gland"])
    bladder = scene.ellipsoid((0, -12, -286), scene.generator.uniform(30, 46, 3) * (1.15, 0.9, 0.8))
    scene.paint(bladder, tissue["muscle"], BLADDER)
    scene.paint(bladder + 4, tissue["urine"], BLADDER)


def trunk(
    size: tuple[int, ...], generator: np.random.Generator, region: str
) -> tuple[Scene, dict, np.ndarray]:
    """Returns a scene, its int16 images `ct` (HU) and `mr`, and the mask of the body, uint8."""
    extent, center = TORSO_REGIONS[region]
    background = [TORSO_SIGNAL["air"][k] for k in range(2)]
    scene = Scene(size, extent, CHANNELS, generator, center=center, warp=4.5, background=background)
    spread = generator.uniform(0.96, 1.04, (len(TORSO_SIGNAL), 2))
    tissue = {name: np.array(v) * s for (name, v), s in zip(TORSO_SIGNAL.items(), spread, strict=True)}
    tissue["air"] = np.array(TORSO_SIGNAL["air"], float)
    body, cavity = draw_body(scene, tissue)
    if region == "torso":
        draw_torso_chest(scene, tissue, body, cavity)
    draw_torso_abdomen(scene, tissue, cavity)
    draw_spine(scene, tissue)
    draw_pelvis(scene, tissue, body)
    inside = body < 0
    ct = scene.values[0] + np.where(inside, scene.texture(9, 3.0), 0) + generator.normal(0, 9, size)
    mr = scene.values[1] * scene.bias(0.1) * (1 + np.where(inside, scene.texture(0.04, 3.0), 0))
    mr = np.abs(mr + generator.normal(0, 0.012, size)) * generator.uniform(300, 900)
    images = {"ct": np.rint(ct.clip(-1024, 3000)).astype(np.int16), "mr": np.rint(mr).astype(np.int16)}
    return scene, images, inside.astype(np.uint8)


def write_autopet(
    root: str | Path, *, num_subjects: int, seed: int = 0, size: tuple[int, ...] = (108, 80, 140),
    progress: Progress = lambda: None,
) -> Path:  # fmt: skip
    """Writes `FDG-PET-CT-Lesions/PETCT_00000000/study/CTres.nii.gz` with maps in `labels/` (the first 30 of
    37 classes). Returns the root.
    """
    root, size = Path(root), check_volume_request(num_subjects, size)
    for number in range(num_subjects):
        scene, images, _ = trunk(size, np.random.default_rng((seed, number)), "torso")
        patient, study = f"PETCT_{number:08x}", "01-01-2003-NA-PET-CT"
        folder = root / "FDG-PET-CT-Lesions" / patient / study
        scene.save(folder / "CTres.nii.gz", images["ct"])
        scene.save(root / "labels" / f"{patient}_{study}.nii.gz", scene.labels)
        progress()
    return root


def write_totalsegmentator_mri(
    root: str | Path, *, num_subjects: int, seed: int = 0, size: tuple[int, ...] = (108, 80, 140),
    progress: Progress = lambda: None,
) -> Path:  # fmt: skip
    """Writes `s0001/mri.nii.gz` and `s0001/segmentations/<organ>.nii.gz`, one binary mask for each organ."""
    from medldm.data.datasets.totalsegmentator_mri import CLASSES

    root, size = Path(root), check_volume_request(num_subjects, size)
    for number in range(num_subjects):
        scene, images, _ = trunk(size, np.random.default_rng((seed, number)), "torso")
        folder = root / f"s{number + 1:04d}"
        scene.save(folder / "mri.nii.gz", images["mr"])
        for value in np.unique(scene.labels[scene.labels > 0]):
            path = folder / "segmentations" / f"{CLASSES[value - 1]}.nii.gz"
            scene.save(path, (scene.labels == value).astype(np.uint8))
        progress()
    return root


def write_synthrad(
    root: str | Path, *, num_subjects: int, seed: int = 0, size: tuple[int, ...] = (128, 96, 64),
    progress: Progress = lambda: None,
) -> Path:  # fmt: skip
    """Writes `Task1/pelvis/1PA001/{mr,ct,mask}.nii.gz` with maps `labels/1PA001_ct_label.nii.gz`."""
    root, size = Path(root), check_volume_request(num_subjects, size)
    for number in range(1, num_subjects + 1):
        scene, images, body = trunk(size, np.random.default_rng((seed, number)), "pelvis")
        name = f"1PA{number:03d}"
        for key, image in (*images.items(), ("mask", body)):
            scene.save(root / "Task1" / "pelvis" / name / f"{key}.nii.gz", image)
        scene.save(root / "labels" / f"{name}_ct_label.nii.gz", scene.labels)
        progress()
    return root


def breast(size: tuple[int, ...], g: np.random.Generator) -> tuple[Scene, np.ndarray]:
    """Draws a chest with two breasts in fat-suppressed T1, in which glands and vessels are bright and fat is
    dark. Classes are 1 breast and 2 vessels.
    """
    scene = Scene(size, (340.0, 300.0, 160.0), ("mr",), g, center=(0, -60, 0), warp=3.5)
    y = scene.points[1]
    chest = scene.ellipsoid((0, 40, 0), (165, 105, 4000), jitter=0.02)
    scene.paint(chest, 0.26)
    scene.paint(chest + 12, 0.42)
    lungs = np.minimum(*(scene.ellipsoid((s * 68, 52, 10), (52, 66, 120)) for s in (-1, 1)))
    scene.paint(lungs, 0.05, within=chest + 22)
    scene.paint(scene.ellipsoid((22, 22, -10), (48, 38, 55), (0, 0, 0.5)), 0.5, within=chest + 20)
    scene.paint(scene.tube([(20, 78, -200), (20, 78, 200)], 12), 0.75)
    scene.paint(scene.tube([(0, -58, -200), (0, -58, 200)], 9), 0.3)
    reach, fullness = g.uniform(62, 92), g.uniform(0.25, 0.75)
    for side in (-1, 1):
        shape = scene.ellipsoid((side * 78, -58, g.normal(0, 4)), (62, reach, 68), jitter=0.04)
        mound = np.maximum(shape, y + 40)
        scene.paint(mound, 0.34)
        scene.paint(mound + 2.5, 0.16, 1)
        lace = scene.waves(1.0, 26.0, 8) - 2 * fullness + 0.9
        core = scene.ellipsoid((side * 78, -62 - 0.3 * reach, 0), (40, 0.62 * reach, 44))
        scene.paint(np.maximum(core, 7 * lace), 0.5 + 0.1 * fullness, 1, within=mound + 5)
        scene.paint(scene.ellipsoid((side * 80, -60 - reach, 0), (6, 6, 6)), 0.45, within=mound - 3)
        for _ in range(5):
            start = np.array([side * (78 + g.uniform(-34, 34)), -56, g.uniform(-40, 40)])
            path = [start]
            for _ in range(3):
                path.append(path[-1] + (g.normal(0, 13), -reach * 0.24, g.normal(0, 13)))
            scene.paint(scene.tube(path, g.uniform(1.8, 3.0)), 1.0, 2, within=mound + 3)
    mr = scene.values[0] * scene.bias(0.12) * (1 + scene.texture(0.05, 2.5))
    mr = np.abs(mr + g.normal(0, 0.012, size)) * g.uniform(300, 700)
    return scene, np.rint(mr).astype(np.int16)


def write_duke(
    root: str | Path, *, num_subjects: int, seed: int = 0, size: tuple[int, ...] = (128, 112, 64),
    progress: Progress = lambda: None,
) -> Path:  # fmt: skip
    """Writes `final_labeled_mr/Breast_MRI_001_0.nii.gz` with `final_label/`, Med-LSDM's NIfTI layout."""
    root, size = Path(root), check_volume_request(num_subjects, size)
    for number in range(1, num_subjects + 1):
        scene, image = breast(size, np.random.default_rng((seed, number)))
        name = f"Breast_MRI_{number:03d}_0.nii.gz"
        scene.save(root / "final_labeled_mr" / name, image)
        scene.save(root / "final_label" / name, scene.labels)
        progress()
    return root


TORSO_PHANTOMS = {
    "autopet": write_autopet,
    "synthrad": write_synthrad,
    "duke": write_duke,
    "totalsegmentator_mri": write_totalsegmentator_mri,
}
