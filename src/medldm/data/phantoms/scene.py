"""Draws anatomy in 3D: shapes are signed distances in millimetres on a warped grid, painted from back to
front.

Coordinates are the patient's: x to the left, y to the back, z upwards. One scene holds several channels (CT,
MR, T1, T2...), so that contrasts are functions of the same tissues.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy import ndimage

from medldm.data.phantoms.files import save_nifti
from medldm.errors import InputError


class Scene:
    """(K, X, Y, Z) values and an (X, Y, Z) class map over a field of view in mm about `center`.

    `warp` (mm) bends the grid smoothly, so that no organ is a plain ellipsoid and subjects differ.
    """

    def __init__(
        self, size: Sequence[int], extent: Sequence[float], channels: Sequence[str],
        generator: np.random.Generator, *, center: Sequence[float] = (0, 0, 0), warp: float = 4.0,
        background: float | Sequence[float] = 0.0,
    ) -> None:  # fmt: skip
        self.size, self.generator, self.channels = tuple(size), generator, tuple(channels)
        self.spacing = tuple(e / n for e, n in zip(extent, size, strict=True))
        axes = [
            ((np.arange(n, dtype=np.float32) - (n - 1) / 2) * np.float32(s) + np.float32(c))
            for n, s, c in zip(size, self.spacing, center, strict=True)
        ]
        x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
        self.raw = (x, y, z)
        self.points = [p + self.waves(warp, 95.0, 4) for p in (x, y, z)]
        values = np.broadcast_to(np.float32(background), len(self.channels))
        self.values = np.ones((len(values), *size), np.float32) * values.reshape(-1, 1, 1, 1)
        self.labels = np.zeros(size, np.uint8)
        self.softness = 0.5 * float(np.mean(self.spacing))

    def waves(self, amplitude: float, length: float, count: int) -> np.ndarray:
        """A smooth random field (X, Y, Z) of about this amplitude and wavelength in mm."""
        g, out = self.generator, np.zeros(self.size, np.float32)
        for _ in range(count):
            k = g.normal(size=3)
            k *= 2 * np.pi / (length * g.uniform(0.7, 1.5)) / np.linalg.norm(k)
            phase = sum(np.float32(ki) * p for ki, p in zip(k, self.raw, strict=True))
            out += np.sin(phase + np.float32(g.uniform(0, 6.3)))
        return out * np.float32(amplitude / np.sqrt(count / 2))

    def ellipsoid(
        self, center: Sequence[float], radii: Sequence[float], angles: Sequence[float] = (0, 0, 0),
        jitter: float = 0.06,
    ) -> np.ndarray:  # fmt: skip
        """The approximate signed distance in mm to an ellipsoid, negative inside. `angles` are rotations
        about x, y and z; centre and radii vary by the share `jitter` of the radii.
        """
        g, radii = self.generator, np.asarray(radii, np.float64)
        center = np.asarray(center) + jitter * radii * g.normal(size=3).clip(-2, 2)
        radii = radii * (1 + jitter * g.normal(size=3).clip(-2, 2))
        d = [p - np.float32(c) for p, c in zip(self.points, center, strict=True)]
        for axis, angle in enumerate(angles):
            if angle:
                i, j = (k for k in range(3) if k != axis)
                c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
                d[i], d[j] = c * d[i] + s * d[j], c * d[j] - s * d[i]
        r = np.sqrt(sum((di / np.float32(ri)) ** 2 for di, ri in zip(d, radii, strict=True)))
        return (r - 1) * np.float32(min(radii))

    def tube(self, path: Sequence[Sequence[float]], radius: float) -> np.ndarray:
        """The signed distance in mm to a tube along a polyline."""
        out = None
        for a, b in zip(path[:-1], path[1:], strict=True):
            a, b = np.float32(a), np.float32(b)
            ab = b - a
            t = sum((p - ai) * di for p, ai, di in zip(self.points, a, ab, strict=True)) / max(ab @ ab, 1e-6)
            t = np.clip(t, 0, 1)
            d = np.sqrt(sum((p - ai - t * di) ** 2 for p, ai, di in zip(self.points, a, ab, strict=True)))
            out = d if out is None else np.minimum(out, d)
        return out - np.float32(radius)

    def paint(
        self, distance: np.ndarray, values: float | Sequence[float | np.ndarray], label: int | None = None,
        within: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Paints one value for each channel where `distance` < 0 (and `within` < 0), with a soft border about
        a voxel wide. `label` is the class there; None keeps the class below. Returns the distance.
        """
        if within is not None:
            distance = np.maximum(distance, within)
        cover = np.clip(0.5 - distance / (2 * self.softness), 0, 1)
        for channel, value in enumerate(np.atleast_1d(np.asarray(values, dtype=object))):
            self.values[channel] += cover * (np.float32(value) - self.values[channel])
        if label is not None:
            self.labels[distance < 0] = label
        return distance

    def texture(self, amplitude: float, length: float) -> np.ndarray:
        """Smoothed noise (X, Y, Z) with this standard deviation and a grain of `length` mm."""
        noise = self.generator.normal(size=self.size).astype(np.float32)
        smooth = ndimage.gaussian_filter(noise, [length / s for s in self.spacing])
        return smooth * np.float32(amplitude / max(smooth.std(), 1e-6))

    def bias(self, strength: float) -> np.ndarray:
        """The shading of a receive coil: a smooth positive field about 1."""
        return np.exp(self.waves(strength, 260.0, 3))

    @property
    def affine(self) -> np.ndarray:
        """The affine of a NIfTI file whose voxel axes run to the left, back and up."""
        affine = np.diag([-self.spacing[0], -self.spacing[1], self.spacing[2], 1.0])
        affine[:3, 3] = [s * (n - 1) / 2 for s, n in zip(self.spacing[:2], self.size[:2], strict=True)] + [0]
        return affine

    def save(self, path: Path, array: np.ndarray) -> None:
        save_nifti(path, array, self.spacing, self.affine)


def check_volume_request(num_subjects: int, size: Sequence[int]) -> tuple[int, ...]:
    if num_subjects < 1:
        raise InputError(f"num_subjects={num_subjects}: give 1 or more")
    if len(size) != 3 or min(size) < 16:
        raise InputError(f"size={list(size)}: give three numbers of voxels, 16 or more")
    return tuple(int(n) for n in size)


def per_channel(table: Mapping[str, Mapping[str, float]], channels: Sequence[str]) -> dict[str, list[float]]:
    """{tissue: one value for each channel}, of a table whose rows are tissues."""
    return {tissue: [values[channel] for channel in channels] for tissue, values in table.items()}
