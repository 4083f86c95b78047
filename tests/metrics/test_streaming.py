"""An evaluation reads images when it needs them: what it holds does not grow with their number."""

import tracemalloc

import cv2
import numpy as np
import pytest
import torch
from synthetic_folders import smooth_images, write_case

from medldm.data.preparation.edges import EdgeRecipe
from medldm.errors import InputError
from medldm.evaluation import measure as measuring
from medldm.evaluation.baselines import make_rows
from medldm.evaluation.foreign import Reading
from medldm.evaluation.measure import measure
from medldm.evaluation.pairs import make_pairs
from medldm.evaluation.stored import StoredImage, load
from medldm.evaluation.tools import Tools
from medldm.metrics.catalogue import select_metrics
from medldm.networks.features import RandomConvFeatures

SIDE = 128
IMAGE_BYTES = 4 * SIDE**2
FOLDERS = ("generated", "reference")


def write_pictures(root, num: int) -> None:
    for k, name in enumerate(FOLDERS):
        (root / name).mkdir(parents=True)
        for i in range(num):
            image = np.random.default_rng([k, i]).integers(0, 256, (SIDE, SIDE), np.uint8)
            cv2.imwrite(str(root / name / f"p{i}.png"), image)


def write_stacks(root, num: int) -> None:
    for k, name in enumerate(FOLDERS):
        for i in range(num // 8):
            write_case(root / name / f"s{i}.h5", smooth_images(8, SIDE, seed=10 * i + k))


def judged(root):
    """All that `medldm evaluate` does with the images of the rows: they are matched and measured."""
    pairs = make_pairs(root / "generated", root / "reference", None, Reading())
    rows = make_rows(pairs, ("mean_image", "random_real", "shuffled"), training=None, seed=0)
    tools = Tools(select_metrics(["psnr"]), recipe=EdgeRecipe())
    tools.networks["random_conv"] = RandomConvFeatures(2)
    return pairs, measure(pairs, rows.images, tools, lambda count: None)


def peak_of(root) -> int:
    """Bytes of arrays at most alive at one time."""
    tracemalloc.start()
    try:
        judged(root)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("write", [write_pictures, write_stacks])
def test_memory_does_not_grow_with_the_number_of_images(tmp_path, monkeypatch, write):
    """Three times the images cost less than half an image for each that was added: its names, numbers and
    features, a sixth to a fifth of these small images, which varies with what ran before. Held, each would
    cost two and a quarter of them or more.
    """
    monkeypatch.setattr(measuring, "VALUES_AT_ONCE", 4 * SIDE**2)
    monkeypatch.setattr("medldm.evaluation.baselines.KEPT_MEANS", {2: 2, 3: 1})
    for num in (16, 48):
        write(tmp_path / str(num), num)
    peak_of(tmp_path / "16")  # what libraries keep of their first use
    few, many = (peak_of(tmp_path / str(num)) for num in (16, 48))
    assert many - few < 32 * IMAGE_BYTES / 2


@pytest.mark.parametrize("write", [write_pictures, write_stacks])
def test_what_is_read_later_is_what_the_files_hold(tmp_path, write):
    write(tmp_path, 16)
    pairs, measured = judged(tmp_path)
    assert all(isinstance(x, StoredImage) for pair in pairs for x in (pair.real, pair.generated[0]))
    for number, pair in enumerate(pairs):
        if write is write_pictures:
            pixels = cv2.imread(str(tmp_path / "reference" / f"{pair.id}.png"), cv2.IMREAD_GRAYSCALE)
            assert np.allclose(load(pair.real)[0], pixels / 127.5 - 1, atol=1e-6)
        else:
            i, row = int(pair.id[1]), int(pair.id[-3:])
            assert np.array_equal(load(pair.generated[0])[0], smooth_images(8, SIDE, seed=10 * i)[row])
            assert np.array_equal(load(pair.mask), load(pair.generated[0]) > 0)
            real = smooth_images(8, SIDE, seed=10 * i + 1)[row]
            assert np.array_equal(load(pair.real_edges)[0], np.abs(np.diff(real, axis=1, prepend=0)) > 0.1)
        x, y = (torch.from_numpy(load(image)).double() for image in (pair.real, pair.generated[0]))
        expected = -10 * torch.log10(((x - y) ** 2).mean() / 4)
        assert measured.values["generated"]["psnr"][number] == pytest.approx(float(expected), rel=1e-5)


def test_images_of_several_sizes_and_a_broken_one_are_all_listed(tmp_path):
    write_pictures(tmp_path, 8)
    for i, side in ((2, 96), (5, 64)):
        cv2.imwrite(str(tmp_path / "generated" / f"p{i}.png"), np.zeros((side, side), np.uint8))
    with pytest.raises(InputError) as error:
        make_pairs(tmp_path / "generated", tmp_path / "reference", None, Reading())
    said = str(error.value)
    assert "2 of 8 files cannot be used" in said and "(96, 96)" in said and "(64, 64)" in said
    assert "\n" not in said


def test_a_file_that_is_taken_away_meanwhile_is_named(tmp_path):
    write_pictures(tmp_path, 4)
    pairs = make_pairs(tmp_path / "generated", tmp_path / "reference", None, Reading())
    (tmp_path / "generated" / "p1.png").unlink()
    with pytest.raises(InputError, match=r"p1\.png"):
        load(pairs[1].generated[0])
