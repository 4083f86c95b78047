"""What a frozen segmenter says of x0_hat: exact values, the weight of noise, and a training that asks one."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F

from medldm.build import load_module
from medldm.builders.additions import build_segmenter_loss
from medldm.diffusion.latent import PixelStage
from medldm.errors import InputError
from medldm.fingerprints import file_sha256
from medldm.losses import feature_distances, map_errors, region_contrast, region_sums
from medldm.models.segmenter_loss import SegmenterLoss
from tests.training import first_difference, load, make_batches, run_training
from tests.training import read_metrics as metrics_of

ASKED = ("experiment=cardiac2d/ldm_seg",)


def quadrants(dims=2, side=4):
    """A map (1, 1, *S) of four classes of equal size; in 3D the same in every slice."""
    half = torch.arange(side) >= side // 2
    mask = (2 * half[:, None] + half[None]).long()
    return mask.expand(*[side] * dims)[None, None]


# ---- the losses on tensors ----


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("num_present", [1, 2, 4])
def test_features_that_are_all_alike_have_a_contrast_of_log_n(dims, num_present):
    """N is the number of classes in the batch, whatever the temperature and however many there could be."""
    mask = quadrants(dims).clamp(max=num_present - 1).repeat(3, *[1] * (dims + 1))
    features = torch.ones(3, 5, *[4] * dims)
    for temperature in (0.1, 2.0):
        found = region_contrast(features, 7 * features, mask, 6, temperature)
        torch.testing.assert_close(found, torch.full((3,), math.log(num_present)), atol=1e-6, rtol=1e-6)


def test_orthogonal_regions_have_a_contrast_of_log_1_plus_n_minus_1_over_e():
    """One axis of feature space a class: the positive's cosine is 1 and the others' 0."""
    mask = quadrants().repeat(2, 1, 1, 1)
    features = F.one_hot(mask[:, 0], 4).movedim(-1, 1).float()
    found = region_contrast(3 * features, features, mask, 4, 0.5)
    torch.testing.assert_close(found, torch.full((2,), math.log(1 + 3 * math.exp(-2))))
    swapped = features[:, [1, 0, 3, 2]]  # each region looks like another one
    wrong = region_contrast(swapped, features, mask, 4, 0.5)
    torch.testing.assert_close(wrong, torch.full((2,), math.log(math.exp(2) + 3)))


def test_regions_are_weighed_by_the_share_of_a_class_in_a_cell():
    """8 x 8 pixels on cells of 4 x 4 pixels: a class that fills a quarter of one cell counts a quarter."""
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.long)
    mask[..., :2, :2] = 1
    features = torch.tensor([[[[8.0, 0.0], [0.0, 0.0]]]])
    sums, sizes = region_sums(features, mask, 3)
    assert sizes.tolist() == [[3.75, 0.25, 0.0]]
    assert sums[..., 0].tolist() == [[6.0, 2.0, 0.0]]


def test_the_positive_of_a_region_is_its_class_over_the_whole_batch():
    """Sample 0 holds class 0 alone, sample 1 class 1: neither alone had anything to be told apart from."""
    mask = torch.tensor([0, 1])[:, None, None, None].expand(2, 1, 2, 2)
    features = torch.eye(2)[:, :, None, None].expand(2, 2, 2, 2)
    found = region_contrast(features, features, mask, 2, 1.0)
    torch.testing.assert_close(found, torch.full((2,), math.log(1 + math.exp(-1))))


def test_the_contrast_has_gradients_of_generated_features_alone():
    """And none is NaN where classes are absent."""
    mask = quadrants().clamp(max=1)
    generated, real = (torch.randn(1, 5, 4, 4, requires_grad=True) for _ in range(2))
    region_contrast(generated, real, mask, 6, 0.1).sum().backward()
    assert generated.grad.isfinite().all() and generated.grad.any() and real.grad is None


def test_the_distance_of_features_is_that_of_their_directions():
    """4 where they point apart, 2 at right angles, whatever their lengths; layers count alike."""
    x = torch.zeros(2, 2, 3, 3)
    x[:, 0] = 1
    y = torch.zeros_like(x)
    y[0, 1], y[1, 0] = 5, -2
    torch.testing.assert_close(feature_distances([x], [y]), torch.tensor([2.0, 4.0]))
    torch.testing.assert_close(feature_distances([x, x], [y, 3 * x]), torch.tensor([1.0, 2.0]))


def test_the_error_of_a_map_is_cross_entropy_and_dice_of_what_is_there():
    """Logits that are all alike: log 4, and Dice 2 (1/4) / (16 / 4 + 4) = 1/4 for classes of a quarter."""
    mask = torch.cat([quadrants(), torch.zeros(1, 1, 4, 4, dtype=torch.long), quadrants().clamp(max=1)])
    found = map_errors(torch.zeros(3, 4, 4, 4), mask)
    quarter = 1 - 2 * (4 / 4) / (16 / 4 + 4)
    three = 1 - 2 * (12 / 4) / (16 / 4 + 12)
    expected = [math.log(4) + quarter, math.log(4), math.log(4) + three]
    torch.testing.assert_close(found, torch.tensor(expected))
    sure = 50 * F.one_hot(mask[:, 0], 4).movedim(-1, 1).float()
    torch.testing.assert_close(map_errors(sure, mask), torch.zeros(3), atol=1e-5, rtol=0)


# ---- weights and levels ----


def test_a_sample_counts_as_its_signal_and_not_at_all_beyond_max_noise():
    """log SNR 0, 2 and -2: half, more than half and less than half of the variance is signal."""
    gamma = torch.tensor([0.0, -2.0, 2.0])
    signal = [0.5, 1 / (1 + math.exp(-2)), 0.0]
    torch.testing.assert_close(SegmenterLoss(map_weight=1).share(gamma), torch.tensor(signal))
    everything = SegmenterLoss(map_weight=1, max_noise=1).share(gamma)
    torch.testing.assert_close(everything[2], torch.tensor(1 / (1 + math.exp(2))))


def ask(segmenter, **options):
    loss = SegmenterLoss(**options)
    loss.ask(load_module(segmenter))
    return loss


def batch_of(pixels=16):
    (batch,) = make_batches(1, 2, pixels)
    return batch


def test_a_perfect_x0_hat_has_the_features_of_the_real_image(segmenter):
    loss, batch = ask(segmenter, feature_weight=2.0), batch_of()
    z = batch["image"]
    found = loss(PixelStage(1, spatial_dims=2), batch, z, z.clone(), torch.zeros(2))
    assert found["loss"].item() == pytest.approx(0, abs=1e-9)
    other = loss(PixelStage(1, spatial_dims=2), batch, z, z.flip(0), torch.zeros(2))
    assert other["loss"].item() == pytest.approx(2 * other["segmenter_features"].item()) and other["loss"] > 0


def test_the_loss_is_the_weighted_sum_of_its_terms(segmenter):
    batch = batch_of()
    loss = ask(segmenter, feature_weight=2.0, map_weight=3.0, contrast_weight=5.0)
    x0_hat = batch["image"].flip(0)
    found = loss(PixelStage(1, spatial_dims=2), batch, batch["image"], x0_hat, torch.tensor([0.0, 30.0]))
    expected = sum(
        weight * found[f"segmenter_{name}"] for name, weight in (("features", 2), ("map", 3), ("contrast", 5))
    )
    torch.testing.assert_close(found["loss"], expected)
    logits = loss.segmenter.looked_at(x0_hat)[1]
    half = 0.5 * map_errors(logits, batch["mask"])[0] / 2  # the second sample is all noise
    torch.testing.assert_close(found["segmenter_map"], half)


def test_images_of_odd_sizes_are_padded_with_their_maps(segmenter):
    batch = batch_of(12)  # the segmenter halves three times
    loss = ask(segmenter, map_weight=1.0, contrast_weight=1.0)
    found = loss(PixelStage(1, spatial_dims=2), batch, batch["image"], batch["image"], torch.zeros(2))
    padded = F.pad(batch["mask"], (0, 4, 0, 4))
    logits = loss.segmenter.network(F.pad(batch["image"], (0, 4, 0, 4), value=-1.0))
    torch.testing.assert_close(found["segmenter_map"], 0.5 * map_errors(logits, padded).mean())


def test_gradients_go_through_decoder_and_quantiser_to_x0_hat_alone(diffusion, segmenter):
    module, loss = load_module(diffusion), ask(segmenter, feature_weight=1.0, map_weight=1.0)
    (batch,) = make_batches(1, 2, 64)
    assert module.first_stage.requantize
    z = module.latents(batch)
    x0_hat = (z + 0.1).requires_grad_()
    decoded = module.first_stage.decode_through(x0_hat)
    torch.testing.assert_close(decoded, module.first_stage.decode(x0_hat.detach()), atol=1e-5, rtol=1e-5)
    loss(module.first_stage, batch, z, x0_hat, torch.zeros(2))["loss"].backward()
    assert x0_hat.grad.any() and x0_hat.grad.isfinite().all()
    frozen = (*module.first_stage.parameters(), *loss.segmenter.parameters())
    assert all(p.grad is None for p in frozen)


# ---- training ----


@pytest.fixture(scope="module")
def options(first_stage, segmenter):
    return (
        *ASKED,
        f"model.first_stage.checkpoint={first_stage}",
        f"model.segmenter.checkpoint={segmenter}",
        "model.segmenter.contrast_weight=0.1",
        "model.segmenter.max_noise=1",
    )


def test_a_training_logs_what_the_segmenter_says_and_remembers_it(prepared, options, segmenter, tmp_path):
    last = run_training(prepared, tmp_path / "run", *options)
    row = metrics_of(tmp_path / "run")[0]
    terms = {name: float(row[f"train/segmenter_{name}"]) for name in ("features", "map", "contrast")}
    assert all(value > 0 for value in terms.values())
    content = load(last)
    assert not any("segmenter" in name for name in content["state_dict"])
    kept = content["medldm"]["segmenter"]
    assert kept["sha256"] == file_sha256(segmenter) and kept["data"] == load(segmenter)["medldm"]["data"]
    assert load_module(last).sample(*batch_to_sample()).isfinite().all()  # needs no segmenter


def batch_to_sample():
    (batch,) = make_batches(1, 2, 64)
    return batch, ["a", "b"], (8, 8)


def test_a_resumed_training_is_bit_equal_and_asks_the_same_segmenter(prepared, options, segmenter, tmp_path):
    longer = (
        "experiment=cardiac2d/ldm",
        "+model/segmenter=contrast",
        *options[1:3],
        "trainer.limit_train_batches=1.0",
        "data.batch_size=4",
    )
    longer += ("model.segmenter.max_noise=1",)
    whole = run_training(prepared, tmp_path / "whole", *longer, "trainer.max_steps=4")
    run_training(prepared, tmp_path / "run", *longer, "trainer.max_steps=2")
    again = run_training(prepared, tmp_path / "run", *longer, "trainer.max_steps=4", "resume=auto")
    for key in ("state_dict", "ema", "optimizer_states"):
        assert first_difference(load(whole)[key], load(again)[key]) is None
    other = tmp_path / "other.ckpt"
    shutil.copy(segmenter.with_name("last.ckpt"), other)
    changed = load(other)
    next(iter(changed["state_dict"].values())).add_(1)
    torch.save(changed, other)
    with pytest.raises(InputError, match="not the file that the resumed run was begun with"):
        more = ("trainer.max_steps=6", "resume=auto", f"model.segmenter.checkpoint={other}")
        run_training(prepared, tmp_path / "run", *longer, *more)
    with pytest.raises(InputError, match=r"model\.segmenter: none, but resume=.* was begun with one"):
        plain = (longer[0], longer[2], *longer[4:6])  # what the segmenter saw would be forgotten
        run_training(prepared, tmp_path / "run", *plain, "trainer.max_steps=6", "resume=auto")
    with pytest.raises(InputError, match=r"resume=.*last\.ckpt was begun without a segmenter"):
        options = (*plain, "trainer.max_steps=1")
        begun = run_training(prepared, tmp_path / "plain", *options)
        run_training(prepared, tmp_path / "plain", *longer, "trainer.max_steps=2", f"resume={begun}")


def test_a_segmenter_that_saw_test_subjects_is_refused(prepared, options, segmenter, tmp_path):
    seen = load(segmenter)
    record = seen["medldm"]["data"]
    record["subjects"]["train"] = [*record["subjects"]["train"], *record["subjects"]["test"]]
    torch.save(seen, tmp_path / "seen.ckpt")
    path = f"model.segmenter.checkpoint={tmp_path / 'seen.ckpt'}"
    with pytest.raises(InputError, match="model.segmenter.checkpoint=.*was trained on subject .* in 'test'"):
        run_training(prepared, tmp_path / "run", *options, path)


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ("model.segmenter.checkpoint=???", "model.segmenter.checkpoint: not given"),
        ("model.segmenter.checkpoint={first_stage}", "holds no segmenter; train one with"),
        ("model.segmenter.map_weight=-1", "model.segmenter.map_weight=-1 must be 0 or above"),
        ("model.segmenter.max_noise=0", r"model.segmenter.max_noise=0 must lie in \(0, 1\]"),
        ("model.segmenter.temperature=0", "model.segmenter.temperature=0 must be above 0"),
        ("+model.segmenter.wieght=1", "model.segmenter: .*unexpected keyword argument 'wieght'"),
    ],
)
def test_what_no_segmenter_could_be_asked_is_told_in_one_line(
    prepared, options, first_stage, tmp_path, typed, text
):
    with pytest.raises(InputError, match=text):
        run_training(prepared, tmp_path / "run", *options, typed.format(first_stage=first_stage))


def test_weights_that_are_all_0_and_a_temperature_that_nothing_reads_are_refused(prepared, options, tmp_path):
    none = [f"model.segmenter.{name}_weight=0" for name in ("feature", "map", "contrast")]
    with pytest.raises(InputError, match="model.segmenter.feature_weight=0, and map_weight"):
        run_training(prepared, tmp_path / "run", *options, *none)


def test_data_without_maps_name_the_weights_that_need_one():
    options = {"checkpoint": "x", "feature_weight": 1.0, "map_weight": 0.0, "contrast_weight": 0.5}
    with pytest.raises(InputError, match="model.segmenter.contrast_weight=0.5: the dataset has no masks"):
        build_segmenter_loss({"segmenter": options}, {"num_classes": 0})


def test_presets_ask_no_segmenter(diffusion):
    assert "segmenter" not in load(diffusion)["medldm"]["model"]
    assert load_module(diffusion).segmenter_loss is None
