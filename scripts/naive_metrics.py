"""Measures pairs of images one by one with scikit-image and torchmetrics, to time `medldm evaluate` against.

python scripts/naive_metrics.py make=1000 FOLDER              256x256 PNG in FOLDER/{generated,reference}
python scripts/naive_metrics.py make=50 volumes=true FOLDER         the same of 64x128x128 NIfTI
python scripts/naive_metrics.py GENERATED REFERENCE                 SSIM, PSNR, RMSE; FID and KID of 2D images
"""

import resource
import sys
import time
from pathlib import Path

import cv2
import nibabel
import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

SHAPES = {False: (256, 256), True: (64, 128, 128)}


def make(folder: Path, num: int, volumes: bool) -> None:
    """Writes smooth images and noisy copies of them."""
    rng = np.random.default_rng(0)
    for name in ("generated", "reference"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(num):
        image = gaussian_filter(rng.normal(size=SHAPES[volumes]), 4)
        image = (image - image.min()) / np.ptp(image)
        noisy = np.clip(image + 0.05 * rng.normal(size=image.shape), 0, 1)
        for name, array in (("reference", image), ("generated", noisy)):
            path = folder / name / f"{i:04d}"
            if volumes:
                nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), np.eye(4)), f"{path}.nii.gz")
            else:
                cv2.imwrite(f"{path}.png", np.round(255 * array).astype(np.uint8))


def read(path: Path) -> np.ndarray:
    if path.suffix == ".png":
        return cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) / 255
    return np.asarray(nibabel.load(path).dataobj, np.float64)


def set_distances(pairs: list[tuple[Path, Path]]) -> dict[str, float]:
    """FID and KID by torchmetrics, with the weights that medldm found, one image at a time."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    from medldm.networks.features import build_features

    network = build_features("inception", spatial_dims=2, image_channels=1, weights_dir=None)

    class Pool3(torch.nn.Module):
        num_features = 2048

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return network(x.float() / 127.5 - 1)

    fid = FrechetInceptionDistance(Pool3(), input_img_size=(1, 256, 256))
    kid = KernelInceptionDistance(Pool3(), subset_size=min(100, len(pairs)))
    for generated, reference in pairs:
        for path, real in ((generated, False), (reference, True)):
            image = torch.from_numpy(np.round(255 * read(path)).astype(np.uint8))[None, None]
            for metric in (fid, kid):
                metric.update(image, real=real)
    return {"fid": float(fid.compute()), "kid": float(kid.compute()[0])}


def main() -> None:
    given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
    folders = [Path(word) for word in sys.argv[1:] if "=" not in word]
    if "make" in given:
        return make(folders[0], int(given["make"]), given.get("volumes") == "true")
    start = time.perf_counter()
    pairs = [(path, folders[1] / path.name) for path in sorted(folders[0].iterdir())]
    scores = []
    for generated, reference in pairs:
        x_hat, x = read(generated), read(reference)
        rmse = float(np.sqrt(((x_hat - x) ** 2).mean()))
        psnr = peak_signal_noise_ratio(x, x_hat, data_range=1)
        scores.append((structural_similarity(x, x_hat, data_range=1), psnr, rmse))
    found = dict(zip(("ssim", "psnr", "rmse"), np.mean(scores, axis=0).tolist(), strict=True))
    if pairs[0][0].suffix == ".png":
        found |= set_distances(pairs)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(", ".join(f"{name} {value:.6g}" for name, value in found.items()))
    print(f"{len(pairs)} pairs in {time.perf_counter() - start:.1f} s, peak memory {peak:.0f} MiB")


if __name__ == "__main__":
    main()
