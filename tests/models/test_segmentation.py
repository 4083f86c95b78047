"""The segmenter and the regression network: losses, Dice, prediction of any size, what they train on."""

import json
import math
from functools import partial

import h5py
import numpy as np
import pytest
import torch
from monai.networks.nets import UNet
from torch import nn

from medldm.commands import sample
from medldm.data import build_datamodule
from medldm.errors import InputError
from medldm.evaluation.stored import load
from medldm.evaluation.translation import make_translation_pairs
from medldm.metrics.overlap import dice
from medldm.models.segmentation import RegressionModule, SegmentationModule, apply_network
from tests.helpers import compose_config
from tests.training import run_training

SHAPES = {2: (24, 20), 3: (8, 16, 12)}
ADAM = partial(torch.optim.Adam, lr=0.01)


def unet(spatial_dims: int, out_channels: int) -> nn.Module:
    torch.manual_seed(0)
    return UNet(spatial_dims, 1, out_channels, channels=(8, 16), strides=(2,), num_res_units=1)


def half_maps(spatial_dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Class 1 in the first half of an axis of 16, against the first quarter."""
    wanted = torch.zeros(1, 1, *(16,) * spatial_dims, dtype=torch.int64)
    found = wanted.clone()
    wanted[:, :, :8], found[:, :, :4] = 1, 1
    return found, wanted


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_dice_of_known_overlap_class_by_class(spatial_dims):
    found, wanted = half_maps(spatial_dims)
    found[..., 0], wanted[..., -1] = 2, 3  # class 2 only found, class 3 only wanted
    scores = dice(torch.cat([found, wanted]), torch.cat([wanted, wanted]), 5)
    size = 16 ** (spatial_dims - 2)
    inner = 4 * size * 14  # of 4 rows found: column 0 is class 2; column 15 is class 3 in the other map
    assert scores.shape == (2, 4)
    assert float(scores[0, 0]) == pytest.approx(2 * inner / (4 * size * 15 + 8 * size * 15))
    assert scores[0, 1:3].tolist() == [0, 0] and math.isnan(scores[0, 3])
    assert scores[1, [0, 2]].tolist() == [1, 1] and scores[1, [1, 3]].isnan().all()


def test_dice_equals_monai():
    from monai.metrics import DiceMetric
    from monai.networks.utils import one_hot

    found, wanted = torch.randint(0, 4, (2, 3, 1, 6, 7, 8), generator=torch.Generator().manual_seed(0))
    metric = DiceMetric(include_background=False, reduction="none")
    expected = metric(one_hot(found, 4), one_hot(wanted, 4))
    assert np.allclose(dice(found, wanted, 4), expected, atol=1e-6)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_loss_of_certain_logits_is_known(spatial_dims):
    """Soft Dice on one-hot targets of the foreground: 0 where all is right, 1 - 2/3 for a half found."""
    module = SegmentationModule(unet(spatial_dims, 2), num_classes=2, optimizer=ADAM)
    found, wanted = half_maps(spatial_dims)
    logits = torch.zeros(1, 2, *wanted.shape[2:])
    right = logits.scatter(1, wanted, 100.0)
    half = logits.scatter(1, found, 100.0)
    assert float(module.criterion(right, wanted)) == pytest.approx(0, abs=1e-6)
    cross_entropy = 100 / 4  # a quarter of the voxels is wrong by 100
    assert float(module.criterion(half, wanted)) == pytest.approx(cross_entropy + 1 / 3, rel=1e-5)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_segmenter_learns_what_a_threshold_shows(spatial_dims):
    module = SegmentationModule(unet(spatial_dims, 2), num_classes=2, optimizer=ADAM)
    module.log = lambda *_, **__: None
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(2, 1, *SHAPES[spatial_dims], generator=generator) > 0.6).long()
    batch = {"image": mask * 1.2 - 0.6 + 0.1 * torch.randn(mask.shape, generator=generator), "mask": mask}
    optimizer = module.configure_optimizers()[0][0]
    for _ in range(30):
        optimizer.zero_grad()
        module.losses(batch, 0)["loss"].backward()
        optimizer.step()
    module.eval()
    assert float(dice(module.segment(batch["image"]), mask, 2).min()) > 0.95


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_prediction_keeps_size_and_place(spatial_dims, window):
    x = torch.randn(2, 1, *(n + 3 for n in SHAPES[spatial_dims]))

    class CheckedIdentity(nn.Module):
        def forward(self, part):
            assert all(side % 8 == 0 for side in part.shape[2:])
            return part.clone()  # MONAI weighs the output in place

    out = apply_network(CheckedIdentity(), x, window=window)
    torch.testing.assert_close(out, x, rtol=0, atol=1e-5)


def test_the_regression_network_gives_the_target_of_a_linear_map():
    module = RegressionModule(unet(3, 1), optimizer=partial(torch.optim.Adam, lr=0.02))
    module.log = lambda *_, **__: None
    source = torch.rand(2, 1, *SHAPES[3], generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = {"source": source, "image": -0.5 * source + 0.2}
    optimizer = module.configure_optimizers()[0][0]
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(module.losses(batch, 0)["loss"])
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]
    assert module(source).shape == source.shape


def data(root, **options):
    return build_datamodule({"root": root, "batch_size": 1, **options}, keys=("image", "mask"), seed=0)


@pytest.fixture
def samples(prepared_3d, tmp_path):
    """Volumes of one half for two training cases, as `medldm sample` writes them."""
    real = data(prepared_3d).dataset("train")
    for item in real.items[:2]:
        with h5py.File(tmp_path / f"{real.cases[item.case]['id']}.h5", "w") as file:
            file["images"] = np.full((1, 32, 32, 32), 0.5, np.float32)
    return tmp_path


def test_training_on_synthetic_takes_images_from_samples_and_maps_from_their_conditions(prepared_3d, samples):
    real = data(prepared_3d).dataset("train")
    made = data(prepared_3d, train_on="synthetic", synthetic=samples).dataset("train")
    both = data(prepared_3d, train_on="both", synthetic=samples).dataset("train")
    assert len(made) == 2 and len(both) == len(real) + 2
    for i in range(2):
        assert (made[i]["image"] == 0.5).all() and torch.equal(made[i]["mask"], real[i]["mask"])
        assert made[i]["case_id"] == real[i]["case_id"]
    assert torch.equal(both[0]["image"], real[0]["image"])
    validation = data(prepared_3d, train_on="synthetic", synthetic=samples).dataset("val")
    assert torch.equal(validation[0]["image"], data(prepared_3d).dataset("val")[0]["image"])


def test_a_share_of_the_training_subjects_is_seeded_and_nested(prepared_3d):
    parts = [set(data(prepared_3d, train_fraction=f).part_of("train")) for f in (0.3, 0.6, 1.0)]
    assert parts[0] < parts[1] < parts[2] and len(parts[2]) == 4 and len(parts[0]) == 1
    whole, part = (data(prepared_3d, train_fraction=f).dataset("val") for f in (1.0, 0.3))
    assert len(whole) == len(part)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"train_on": "fake"}, "data.train_on=fake: choose real, synthetic, both"),
        ({"train_on": "both"}, "data.synthetic: name a folder"),
        ({"train_on": "both", "synthetic": "/none"}, "data.synthetic=/none: no .h5 file"),
        ({"train_fraction": 0.0}, "data.train_fraction=0.0: it must lie"),
    ],
)
def test_what_cannot_be_trained_on_is_named(prepared_3d, options, said):
    with pytest.raises(InputError, match=said):
        data(prepared_3d, **options)


# ---- regression over pairs ----


@pytest.fixture(scope="module")
def modalities(tmp_path_factory):
    """Six subjects with t1 and t2 = -t1 / 2, 16 voxels wide, as `medldm prepare` leaves them."""
    root = tmp_path_factory.mktemp("modalities")
    (root / "cases").mkdir()
    rng, cases = np.random.default_rng(0), []
    for subject in range(6):
        t1 = rng.uniform(-1, 1, (1, 16, 16, 16)).astype(np.float16)
        for label, (name, image) in enumerate((("t1", t1), ("t2", -t1 / 2))):
            case = f"s{subject}_{name}"
            with h5py.File(root / "cases" / f"{case}.h5", "w") as file:
                file["image"] = image
            cases.append(
                {
                    "id": case, "subject": f"s{subject}", "file": f"cases/{case}.h5", "label": label,
                    "affine": np.eye(4).tolist(), "original_affine": np.eye(4).tolist(),
                    "original_shape": [16, 16, 16], "intensity_range": [0.0, 100.0],
                    "spacing": [1, 1, 1], "shape": [16, 16, 16],
                }
            )  # fmt: skip
    index = {
        "schema_version": 1, "dataset": "brats", "spatial_dims": 3, "num_classes": None, "num_labels": 2,
        "image_channels": 1, "label_values": ["t1", "t2"], "image_size": [16, 16, 16], "cases": cases,
        "preprocess": {"orientation": "RAS"},
    }  # fmt: skip
    (root / "index.json").write_text(json.dumps(index))
    split = {"train": ["s0", "s1", "s2", "s3"], "val": ["s4"], "test": ["s5"]}
    (root / "splits.json").write_text(json.dumps({"default": split}))
    return root


def test_a_regression_trains_on_a_pair_and_writes_what_translation_evaluation_reads(modalities, tmp_path):
    options = ("model=regression", "data=folder", "data.spatial_dims=3", "data.pair_labels=[[t1,t2]]")
    run = run_training(modalities, tmp_path / "run", *options, "data.pairs=random")
    paths = (
        f"checkpoint={run.with_name('best.ckpt')}",
        f"data.root={modalities}",
        f"output={tmp_path / 'out'}",
    )
    sample.task(compose_config("sample", *paths, *options[1:], "split=all", "png=false"))
    names = sorted(path.name for path in (tmp_path / "out").glob("*.h5"))
    assert names == [f"s{i}_t1_to_t2.h5" for i in range(6)]
    with h5py.File(tmp_path / "out" / names[0]) as file:
        assert file["images"].shape == (1, 16, 16, 16)
        assert (file.attrs["source_label"], file.attrs["target_label"]) == ("t1", "t2")
    pairs = make_translation_pairs(tmp_path / "out", modalities, None, {})
    assert [pair.attributes["pair"] for pair in pairs] == ["t1 to t2"] * 6
    assert np.allclose(load(pairs[0].real), -load(pairs[0].source) / 2, atol=1e-3)


def test_training_a_regression_without_pairs_is_one_line(modalities, tmp_path):
    with pytest.raises(InputError, match="data.pairs=null"):
        run_training(modalities, tmp_path / "run", "model=regression", "data=folder", "data.spatial_dims=3")
