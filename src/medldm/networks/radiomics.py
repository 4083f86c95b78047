"""Radiomic features of images by pyradiomics, as the Frechet radiomic distance takes them.

Konz, Osuala et al., "Frechet Radiomic Distance (FRD)", Medical Image Analysis 2026: the settings are those of
its version 1, which the package frd-score 1.0.1 runs.
"""

import hashlib
import importlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from medldm.errors import InputError

ADVICE = (
    "frd takes the features of pyradiomics, which cannot be imported ({error}); its build needs to be "
    "prepared: "
    "`pip install setuptools wheel versioneer cython`, then `pip install --no-build-isolation --no-deps "
    "pyradiomics==3.0.1`, then `pip install SimpleITK PyWavelets six pykwalify docopt`"
)
FEATURE_CLASSES = {
    "firstorder": None,
    "glcm": [
        "Autocorrelation", "JointAverage", "ClusterProminence", "ClusterShade", "ClusterTendency", "Contrast",
        "Correlation", "DifferenceAverage", "DifferenceEntropy", "DifferenceVariance", "JointEnergy",
        "JointEntropy", "Imc1", "Imc2", "Idm", "Idmn", "Id", "Idn", "InverseVariance", "MaximumProbability",
        "SumEntropy", "SumSquares",
    ],
    "glrlm": None,
    "glszm": None,
    "ngtdm": None,
}  # fmt: skip
IMAGE_TYPES = {"Original": {}, "LoG": {"sigma": [2.0, 3.0, 4.0, 5.0]}, "Wavelet": {}}
EXTRACTION = {
    "normalize": True,
    "normalizeScale": 100,
    "interpolator": "sitkBSpline",
    "padDistance": 10,
    "preCrop": True,
    "binWidth": 5,
    "voxelArrayShift": 300,
    "label": 1,
}
OF_DIMS = {
    2: {"resampledPixelSpacing": [2, 2, 0], "force2D": True, "force2Ddimension": 0},
    3: {"resampledPixelSpacing": [2, 2, 2], "correctMask": True, "minimumROIDimensions": 1},
}
PROBE = 24  # voxels a side of the image whose features are counted


def import_library(name: str) -> ModuleType:
    """InputError with the way to install it where a library of the features is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(ADVICE.format(error=error)) from error


def mute_library() -> None:
    """Keeps the lines that pyradiomics logs of every image and feature class off the screen: it gives them to
    whatever handlers a program has, which its own `setVerbosity` does not prevent.
    """
    logging.getLogger("radiomics").setLevel(logging.CRITICAL + 1)


class RadiomicFeatures(nn.Module):
    """(B, 1, *S) in [-1, 1] -> (B, D) float64: textures and statistics of the image, of its Laplacians of
    Gaussians and of its wavelets, and what pyradiomics reports of the image itself.

    Images are measured on the scale 0 to 255 in steps of 16 bits, so that 8-bit pictures are what they were:
    a voxel at the edge of a bin of intensities would move by a rounding. `spacing` is the size of a voxel
    along the axes of the array in mm, 1 where it is None; features are taken on a grid of 2 mm. NaN in the
    row of an image that has none, such as a constant one.
    """

    def __init__(self, spatial_dims: int, spacing: Sequence[float] | None = None) -> None:
        super().__init__()
        if spacing is not None and len(spacing) != spatial_dims:
            raise InputError("frd takes volumes of one voxel size, these have several; resample them alike")
        extractor = import_library("radiomics.featureextractor")
        self.sitk = import_library("SimpleITK")
        mute_library()
        self.spacing = [1.0] * spatial_dims if spacing is None else [float(size) for size in spacing]
        settings = EXTRACTION | OF_DIMS[spatial_dims]
        parts = {"imageType": IMAGE_TYPES, "featureClass": FEATURE_CLASSES, "setting": settings}
        self.extractor = extractor.RadiomicsFeatureExtractor(parts)
        stated = json.dumps([parts, self.spacing, version("pyradiomics")], sort_keys=True)
        self.sha256 = hashlib.sha256(stated.encode()).hexdigest()
        probe = np.random.default_rng(0).random((PROBE,) * spatial_dims) * 255
        self.names = list(self.measured(probe))
        self.num_features = len(self.names)

    def measured(self, image: np.ndarray) -> Mapping[str, float]:
        """The features by name of an image (*S)."""
        spacing = self.spacing[::-1]  # SimpleITK's axes are x, y, z
        if image.ndim == 2:
            image, spacing = image[None], [*spacing, 1.0]
        mask = np.ones(image.shape, np.uint8)
        mask[0, 0, 0] = 0  # as frd-score has it: pyradiomics refuses a mask that is full
        pair = [self.sitk.GetImageFromArray(array) for array in (image.astype(np.float32), mask)]
        for each in pair:
            each.SetSpacing(spacing)
        found = {}
        for name, value in self.extractor.execute(*pair).items():
            try:
                found[name] = float(value)
            except (TypeError, ValueError):
                continue  # texts and tuples among the diagnostics
        return found

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 1:
            raise InputError(f"radiomics: {x.shape[1]} image channels; it takes one")
        images = (((x[:, 0].double().clamp(-1, 1) + 1) * 127.5 * 257).round() / 257).cpu().numpy()
        rows = []
        for image in images:
            found = {} if np.ptp(image) == 0 else self.measured(image)
            rows.append([found.get(name, math.nan) for name in self.names])
        return torch.tensor(rows, dtype=torch.float64)
