"""Makes the folders and the stored numbers of test_radiomics.py by the package frd-score 1.0.1.

python -m venv VENV; VENV/bin/pip install numpy setuptools wheel versioneer cython
VENV/bin/pip install --no-build-isolation --no-deps pyradiomics==3.0.1 frd-score==1.0.1
VENV/bin/pip install six pykwalify docopt PyWavelets SimpleITK scipy opencv-python-headless
VENV/bin/python tests/metrics/radiomics_reference.py FOLDER tests/metrics/radiomics_reference.npz
"""

import sys
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

SETS = {"reference": (0, 3.0), "generated": (100, 2.5)}  # the first seed, and how smooth its images are
SHAPES = {2: (48, 40), 3: (20, 16, 24)}
COUNTS = {2: 12, 3: 6}


def images_of(name: str, spatial_dims: int) -> list[np.ndarray]:
    """uint8 images (*S) of one set, each of a seed of its own."""
    first, sigma = SETS[name]
    made = []
    for seed in range(first, first + COUNTS[spatial_dims]):
        rng = np.random.default_rng(seed)
        x = gaussian_filter(rng.normal(size=SHAPES[spatial_dims]), sigma)
        x = (x - x.min()) / np.ptp(x) + 0.05 * rng.normal(size=x.shape)
        made.append(np.round(255 * np.clip(x, 0, 1)).astype(np.uint8))
    return made


def main(folder: Path, output: Path) -> None:
    import SimpleITK
    from frd_score import frd

    stored = {}
    for dims in SHAPES:
        paths = []
        for name in SETS:
            place = folder / f"{dims}d" / name
            place.mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(images_of(name, dims)):
                ending = "png" if dims == 2 else "nii.gz"
                SimpleITK.WriteImage(SimpleITK.GetImageFromArray(image), str(place / f"p{i:02d}.{ending}"))
            paths.append(str(place))
        stored[f"frd_{dims}d"] = frd.compute_frd(paths, num_workers=1)
        extractor = frd.get_feature_extractor(image_dim=dims)
        for name, path in zip(SETS, paths, strict=True):
            files = sorted(Path(path).iterdir())
            found = [frd.process_image_mask_pair((file, None), feature_extractor=extractor) for file in files]
            stored[f"{name}_{dims}d"] = np.array([values for values, *_ in found], np.float32)
            stored[f"names_{dims}d"] = np.array(list(found[0][1]))
    np.savez_compressed(output, **stored)
    print({key: value if "frd" in key else value.shape for key, value in stored.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
