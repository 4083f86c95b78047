"""Pictures as (3, H, W) uint8 tensors; callbacks and commands write them."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torchvision.utils import make_grid

from medldm.batch import to_uint8
from medldm.diffusion.schedule import NoiseSchedule
from medldm.errors import InputError
from medldm.files import replacing

if TYPE_CHECKING:  # matplotlib is imported where a figure is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def rendered(figure: "Figure") -> Tensor:
    """A matplotlib figure as (3, H, W) uint8."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    array = np.array(Image.open(buffer).convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def new_axes(columns: int, size: float = 3.2) -> "tuple[Figure, Sequence[Axes]]":
    """A figure with this many axes side by side, each `size` inches wide and high, and the axes. It is made
    without pyplot, which would need a display and keep every figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * size, size), layout="constrained")
    return figure, figure.subplots(1, columns, squeeze=False)[0]


@torch.no_grad()
def schedule_figure(schedule: NoiseSchedule) -> Tensor:
    """gamma, SNR, alpha and sigma over t."""
    device = next(iter([*schedule.parameters(), *schedule.buffers()]), torch.zeros(())).device
    t = torch.linspace(0, 1, 401, dtype=torch.float64, device=device)
    gamma = schedule.gamma(t)
    alpha, sigma, *_ = schedule.path.scales(gamma)
    t, gamma, alpha, sigma = (v.cpu().numpy() for v in (t, gamma, alpha, sigma))
    figure, axes = new_axes(3)
    axes[0].plot(t, gamma)
    axes[0].set_title(f"gamma: {gamma[0]:.2f} to {gamma[-1]:.2f}")
    axes[1].semilogy(t, np.exp(-gamma))
    axes[1].set_title("SNR")
    axes[2].plot(t, alpha, label="alpha")
    axes[2].plot(t, sigma, label="sigma")
    axes[2].legend()
    axes[2].set_title("scales of signal and noise")
    for axis in axes:
        axis.set_xlabel("t")
        axis.grid(alpha=0.3)
    return rendered(figure)


def points_figure(data: Tensor, samples: Tensor) -> Tensor:
    """Two-dimensional points (N, 2): data and samples, side by side on the same axes."""
    figure, axes = new_axes(2, 4.0)
    for axis, points, title in zip(axes, (data, samples), ("data", "samples"), strict=True):
        x, y = points.float().cpu().numpy().T
        axis.scatter(x, y, s=3)
        axis.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal", title=f"{title} (n = {len(points)})")
    return rendered(figure)


def axial_slices(x: Tensor, orientation: str | None = None) -> Tensor:
    """Volumes (B, C, D, H, W) -> (B, C, S, H', W'): axial slices from the feet up, the front of the body up
    and its left to the right, whatever the axes of `orientation` (SPL where it is None).
    """
    pairs, code = ("SI", "PA", "LR"), orientation or "SPL"
    places = [next(i for i, letter in enumerate(code) if letter in pair) for pair in pairs]
    x = x.permute(0, 1, *(2 + i for i in places))
    return x.flip([2 + k for k, i in enumerate(places) if code[i] != pairs[k][0]])


def middle_slice(x: Tensor, orientation: str | None = None) -> Tensor:
    """The middle one of the `axial_slices` of volumes (B, C, D, H, W); images (B, C, H, W) stay
    as they are.
    """
    if x.ndim == 4:
        return x
    x = axial_slices(x, orientation)
    return x[:, :, x.shape[2] // 2]


def sweep(rows: Sequence[Tensor], orientation: str | None = None) -> list[np.ndarray]:
    """The first volume of each row (B, C, D, H, W) in [-1, 1], side by side: one frame (H, W) uint8 for each
    slice.
    """
    slices = [axial_slices(row[:1, :1].float().cpu(), orientation)[0, 0] for row in rows]
    return list(to_uint8(torch.cat(slices, dim=2)).numpy())


def grid(rows: list[Tensor], orientation: str | None = None) -> Tensor:
    """Rows of (B, C, *S) in [-1, 1] -> a picture (3, H, W) uint8 with one line for each row."""
    images = torch.cat([middle_slice(row.float().cpu(), orientation)[:, :1] for row in rows])
    picture = make_grid(
        images.clamp(-1, 1), nrow=len(rows[0]), padding=2, normalize=True, value_range=(-1, 1)
    )
    return (picture * 255).round().to(torch.uint8)


def save_png(path: Path, picture: Tensor) -> None:
    """Write (3, H, W) uint8 as a PNG file, whole or not at all."""
    from PIL import Image

    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    with replacing(path) as aside:
        image.save(aside, format="PNG")


def save_gif(path: Path, frames: Sequence[np.ndarray], milliseconds: int = 200) -> None:
    """Write frames (H, W) uint8 as a GIF; the last one stays longer."""
    from PIL import Image

    pictures = [Image.fromarray(frame) for frame in frames]
    times = [milliseconds] * (len(frames) - 1) + [5 * milliseconds]
    with replacing(path) as aside:
        pictures[0].save(
            aside, format="GIF", save_all=True, append_images=pictures[1:], duration=times, loop=0
        )


def save_mp4(path: Path, frames: Sequence[np.ndarray], milliseconds: int = 200) -> None:
    """(H, W) uint8 frames as MPEG-4 video, whose grey levels are off by some four of 256; the last one stays
    longer. Odd sizes are padded by their last line to even ones, which the format asks for. InputError where
    OpenCV cannot write it.
    """
    import cv2

    even = [np.pad(frame, [(0, n % 2) for n in frame.shape], mode="edge") for frame in frames]
    with replacing(path) as aside:
        film = aside.with_name(f"{aside.name}.mp4")  # OpenCV goes by the suffix
        size = even[0].shape[::-1]
        writer = cv2.VideoWriter(str(film), cv2.VideoWriter_fourcc(*"mp4v"), 1000 / milliseconds, size)
        try:
            if not writer.isOpened():
                raise InputError(f"{path}: OpenCV cannot write MP4 here; set video_format=gif")
            for frame in (*even, *[even[-1]] * 4):
                writer.write(cv2.cvtColor(frame, cv2.COLOR_GRAY2BGR))
            writer.release()
            os.replace(film, aside)
        finally:
            writer.release()
            film.unlink(missing_ok=True)


SAVE_VIDEO = {"gif": save_gif, "mp4": save_mp4}  # by format, which is the suffix too
