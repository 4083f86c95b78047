"""Draws anatomy in 2D: shapes are signed distances in millimetres, painted from back to front with soft
borders.

The image and its class map follow from the same distances, so that they fit each other.
"""

import numpy as np

CARDIAC_SIGNAL = {  # in a balanced steady-state sequence, relative to blood
    "air": 0.02, "lung": 0.06, "fat": 0.88, "muscle": 0.27, "bone": 0.10, "marrow": 0.48, "liver": 0.36,
    "vessel": 0.72, "myocardium": 0.31, "blood": 0.93, "spleen": 0.52, "cord": 0.66,
}  # fmt: skip


class Canvas:
    """A slice in mm, with x to the right of the picture and y downwards, painted from back to front.

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
        self.values = np.full(shape, CARDIAC_SIGNAL["air"], np.float32)

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
        """The approximate signed distance in mm to an ellipse, negative inside. `lobes` are relative Fourier
        amplitudes of its outline.
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
        """Paints `value` where `distance` < 0, with a soft border about a pixel wide."""
        cover = np.clip(0.5 - distance / (2 * self.softness), 0, 1)
        self.values += cover * (value - self.values)


def draw_lobes(generator: np.random.Generator, amplitude: float, count: int = 3) -> np.ndarray:
    return np.stack(
        [generator.normal(0, amplitude, count) / np.arange(1, count + 1), generator.uniform(0, 6.3, count)], 1
    )
