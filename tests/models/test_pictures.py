"""What a training shows of its samples: pictures, and whole volumes with a sweep through their slices."""

from types import SimpleNamespace

import cv2
import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

from medldm.callbacks import Pictures
from medldm.errors import InputError
from medldm.plots import save_mp4
from tests.training import VQVAE, run_training


class Logger:
    def __init__(self) -> None:
        self.videos: list = []

    def log_video(self, key: str, videos: list, **options) -> None:
        self.videos.append((key, videos, options))


def validate(folder, times: int, orientation: str = "LPS", **options) -> tuple[dict, list]:
    """Files and videos after some validations of a module whose rows are a ramp along the last axis and its
    negative.
    """
    ramp = torch.linspace(-1, 1, 6).expand(2, 1, 4, 5, 6)
    description = {"facts": {"orientation": orientation}}
    module = SimpleNamespace(
        picture=lambda batch: [ramp, -ramp], figures=lambda batch: {}, description=description
    )
    trainer = SimpleNamespace(sanity_checking=False, is_global_zero=True, global_step=0, loggers=[Logger()])
    pictures = Pictures(folder, **options)
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64)).expand(2, 4, 4)
    for step in range(times):
        trainer.global_step = step
        pictures.on_validation_batch_start(trainer, module, {"image": ramp, "affine": affine}, 0)
        pictures.on_validation_epoch_end(trainer, module)
    return {path.name for path in folder.iterdir()}, trainer.loggers[0].videos


def test_volumes_come_whole_every_so_many_validations(tmp_path):
    names, videos = validate(tmp_path, 3, every_n_validations=3, volumes_every_n_validations=2)
    steps = {"step_0000000.png"} | {
        f"{n}_000000{k}.{e}" for k in (0, 2) for n, e in (("sweep", "gif"), ("volume", "nii.gz"))
    }
    assert names == steps
    assert (
        videos[0] == ("sweep", [str(tmp_path / "sweep_0000000.gif")], {"format": ["gif"]})
        and len(videos) == 2
    )
    image = nibabel.load(tmp_path / "volume_0000000.nii.gz")
    values = image.get_fdata()
    assert values.shape == (4, 5, 6, 2)  # the rows of the picture lie along the fourth axis
    np.testing.assert_allclose(values[1, 2, :, 0], np.linspace(-1, 1, 6), atol=1e-6)
    np.testing.assert_array_equal(values[..., 1], -values[..., 0])
    assert image.header.get_zooms()[:3] == (2, 3, 4)
    np.testing.assert_allclose(image.affine @ [1.5, 2, 2.5, 1], [0, 0, 0, 1], atol=1e-6)


def test_the_sweep_shows_the_slices_from_the_feet_up_side_by_side(tmp_path):
    validate(tmp_path, 1, volumes_every_n_validations=1)
    with Image.open(tmp_path / "sweep_0000000.gif") as film:
        assert (film.n_frames, film.size) == (6, (2 * 4, 5))
        for k in range(6):
            film.seek(k)
            grey = np.asarray(film.convert("L"), float)
            expected = round((k / 5) * 255)
            assert (
                np.abs(grey[:, :4] - expected).max() <= 1
                and np.abs(grey[:, 4:] - (255 - expected)).max() <= 1
            )


def test_nothing_whole_is_written_unless_asked_for_and_never_of_slices(prepared, tmp_path):
    assert validate(tmp_path / "a", 1)[0] == {"step_0000000.png"}
    with pytest.raises(InputError, match="volumes_every_n_validations=0: give 1 or more"):
        Pictures(tmp_path, volumes_every_n_validations=0)
    with pytest.raises(InputError, match="the images are no volumes"):
        run_training(prepared, tmp_path / "run", VQVAE, "callbacks.pictures.volumes_every_n_validations=1")
    assert not (tmp_path / "run").exists()


def test_an_mp4_is_read_back_as_it_was_written(tmp_path):
    ramp = np.tile(np.linspace(20, 220, 45).astype(np.uint8), (31, 1))  # of odd sizes
    frames = [np.roll(ramp, 9 * k, axis=1) for k in range(3)]
    save_mp4(tmp_path / "a.mp4", frames)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    film = cv2.VideoCapture(str(tmp_path / "a.mp4"))
    assert film.get(cv2.CAP_PROP_FPS) == 5 and film.get(cv2.CAP_PROP_FRAME_COUNT) == 3 + 4
    for frame in (*frames, frames[-1]):
        there, got = film.read()
        assert there and got.shape == (32, 46, 3)
        assert np.abs(got[:31, :45, 0].astype(int) - frame).mean() < 6  # its quantiser; another frame: 60
    film.release()
