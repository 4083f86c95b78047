import numpy as np
import pytest
import torch
from skimage.metrics import (
    mean_squared_error,
    normalized_root_mse,
    peak_signal_noise_ratio,
    structural_similarity,
)

from medldm.errors import InputError
from medldm.metrics import bootstrap
from medldm.metrics.adherence import edge_f1
from medldm.metrics.bootstrap import bootstrap_mean, bootstrap_ratio
from medldm.metrics.catalogue import select_metrics
from medldm.metrics.image import (
    PairedMetric,
    mae,
    nmse_energy,
    nmse_var,
    psnr,
    rmse,
    ssim_gaussian,
    to_unit,
)
from medldm.metrics.similarity import MS_WEIGHTS, ms_ssim, num_scales, ssim

SHAPES = {2: (31, 24), 3: (12, 17, 14)}


def pair(spatial_dims: int, batch: int = 2, channels: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(spatial_dims)
    shape = (batch, channels, *SHAPES[spatial_dims])
    real = torch.rand(shape, generator=generator)
    return (real + 0.2 * torch.randn(shape, generator=generator)).clamp(0, 1), real


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_ssim_equals_scikit_image(spatial_dims):
    generated, real = pair(spatial_dims)
    pairs = zip(real[:, 0].numpy(), generated[:, 0].numpy(), strict=True)
    expected = [structural_similarity(x.astype(float), y.astype(float), data_range=1.0) for x, y in pairs]
    assert np.allclose(ssim(generated, real), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_gaussian_ssim_equals_scikit_image(spatial_dims):
    generated, real = pair(spatial_dims)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    pairs = zip(real[:, 0].double().numpy(), generated[:, 0].double().numpy(), strict=True)
    expected = [structural_similarity(x, y, **options) for x, y in pairs]
    assert np.allclose(ssim_gaussian(generated, real), expected, rtol=0, atol=1e-9)


def test_gaussian_ssim_of_a_volume_equals_monai():
    from monai.metrics.regression import compute_ssim_and_cs

    generator = torch.Generator().manual_seed(0)
    real = torch.rand(1, 1, 24, 70, 72, generator=generator)  # more than one slab, more than one block
    generated = (real + 0.2 * torch.randn(real.shape, generator=generator)).clamp(0, 1)
    maps, _ = compute_ssim_and_cs(generated, real, 3, (11,) * 3, (1.5,) * 3)
    assert float(ssim_gaussian(generated, real)) == pytest.approx(float(maps.mean()), abs=2e-5)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_ssim_of_a_region_is_the_mean_over_its_window_centres(spatial_dims):
    generated, real = pair(spatial_dims)
    region = torch.rand(real.shape, generator=torch.Generator().manual_seed(3)) > 0.7
    region[1] = False
    x, y = (image[0, 0].double().numpy() for image in (real, generated))
    _, full = structural_similarity(x, y, data_range=1.0, full=True)
    inner = (slice(3, -3),) * spatial_dims
    value = ssim(generated, real, region=region)
    assert float(value[0]) == pytest.approx(full[inner][region[0, 0].numpy()[inner]].mean(), abs=1e-9)
    assert value[1].isnan()


@pytest.mark.parametrize(
    ("shape", "scales"), [((1, 176, 181), 5), ((1, 30, 26, 44), 2), ((1, 45, 48, 44), 3)]
)
def test_ms_ssim_equals_monai_with_as_many_scales_as_fit(shape, scales):
    from monai.metrics.regression import compute_ms_ssim

    generator = torch.Generator().manual_seed(1)
    real = torch.rand(2, *shape, generator=generator)
    generated = (real + 0.3 * torch.randn(real.shape, generator=generator)).clamp(0, 1)
    assert num_scales(shape[1:]) == scales
    powers = np.array(MS_WEIGHTS[:scales]) * sum(MS_WEIGHTS) / sum(MS_WEIGHTS[:scales])
    expected = compute_ms_ssim(generated, real, len(shape) - 1, weights=powers.tolist()).flatten()
    assert ms_ssim(generated, real, scales=scales).tolist() == pytest.approx(expected.tolist(), abs=5e-5)


def test_ms_ssim_is_one_for_equal_images_and_names_a_volume_too_small():
    x = torch.rand(1, 1, 24, 24, 24)
    assert float(ms_ssim(x, x, scales=2)) == pytest.approx(1)
    with pytest.raises(InputError, match=r"ms_ssim at scale 3: image \(6, 6, 6\) is smaller"):
        ms_ssim(x, x, scales=3)


def test_ssim_averages_channels_as_scikit_image():
    generated, real = pair(2, batch=1, channels=3)
    x, y = (image[0].double().numpy() for image in (real, generated))
    expected = structural_similarity(x, y, data_range=1.0, channel_axis=0)
    assert float(ssim(generated, real)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_ssim_is_one_for_equal_and_near_zero_for_independent_noise(spatial_dims):
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(2, 1, *(40,) * spatial_dims, generator=generator)
    assert torch.equal(ssim(noise, noise), torch.ones(2, dtype=torch.float64))
    assert abs(float(ssim(noise[:1], noise[1:]))) < 0.1


def test_ssim_names_an_image_smaller_than_its_window():
    with pytest.raises(InputError, match=r"\(5, 9\) is smaller than the window of 7"):
        ssim(torch.rand(1, 1, 5, 9), torch.rand(1, 1, 5, 9))


def test_nmse_var_is_one_for_the_mean_image():
    _, real = pair(2)
    flat = real.double().mean((2, 3), keepdim=True).expand(real.shape)
    num_pixels = real[0].numel()
    assert nmse_var(flat, real).tolist() == pytest.approx([(num_pixels - 1) / num_pixels] * 2, abs=1e-12)


def test_nmse_var_is_two_for_an_independent_image_of_equal_statistics():
    images = torch.randn(2, 1, 256, 256, generator=torch.Generator().manual_seed(0))
    assert float(nmse_var(images[:1], images[1:])) == pytest.approx(2, abs=0.03)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_errors_equal_scikit_image(spatial_dims):
    y, x = (images.double() for images in pair(spatial_dims))
    for i in range(len(x)):
        real, made = x[i].numpy(), y[i].numpy()
        noise = peak_signal_noise_ratio(real, made, data_range=1)
        assert float(psnr(y, x)[i]) == pytest.approx(noise, rel=1e-9)
        assert float(rmse(y, x)[i]) == pytest.approx(mean_squared_error(real, made) ** 0.5, rel=1e-9)
        energy = normalized_root_mse(real, made, normalization="euclidean") ** 2
        assert float(nmse_energy(y, x)[i]) == pytest.approx(energy, rel=1e-9)
        variance = mean_squared_error(real, made) / real.var(ddof=1)
        assert float(nmse_var(y, x)[i]) == pytest.approx(variance, rel=1e-9)


def test_errors_of_a_region_are_those_of_its_voxels():
    generated, real = pair(2)
    region = torch.zeros(2, 1, *SHAPES[2], dtype=torch.bool)
    region[0, :, 3:10, 5:9] = region[1, :, 20:, :3] = True
    for i in range(2):
        made, truth = (images[i][region[i]].double() for images in (generated, real))
        squared, absolute = float((made - truth).square().mean()), float((made - truth).abs().mean())
        assert float(rmse(generated, real, region=region)[i]) == pytest.approx(squared**0.5, rel=1e-12)
        assert float(mae(generated, real, region=region)[i]) == pytest.approx(absolute, rel=1e-12)
        noise = -10 * np.log10(squared)
        assert float(psnr(generated, real, region=region)[i]) == pytest.approx(noise, rel=1e-12)


def test_nmse_energy_and_errors_by_hand():
    real, generated = torch.full((1, 1, 4, 4), 0.5), torch.full((1, 1, 4, 4), 0.75)
    assert float(nmse_energy(generated, real)) == pytest.approx(0.25)
    assert float(rmse(generated, real)) == pytest.approx(0.25)
    assert float(mae(generated, real)) == pytest.approx(0.25)
    assert float(psnr(generated, real)) == pytest.approx(-20 * np.log10(0.25))
    assert float(psnr(generated, real, data_range=2.0)) == pytest.approx(20 * np.log10(8))


def test_paired_metric_counts_a_constant_real_image_as_excluded():
    generated, real = pair(2)
    real[1] = 0.5
    metric = PairedMetric(nmse_var)
    metric.update(2 * generated - 1, 2 * real - 1)
    assert float(metric.compute()) == pytest.approx(float(nmse_var(generated[:1], real[:1])), rel=1e-5)
    assert (int(metric.num_images), int(metric.num_excluded)) == (1, 1)


def test_paired_metric_clamps_and_weighs_images_equally():
    metric = PairedMetric(mae)
    metric.update(torch.full((3, 1, 8, 8), 5.0), torch.full((3, 1, 8, 8), -5.0))
    metric.update(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8))
    assert float(metric.compute()) == 0.75
    assert to_unit(torch.tensor([-3.0, 0.0, 3.0])).tolist() == [0, 0.5, 1]


def test_an_unknown_metric_is_named():
    with pytest.raises(ValueError, match="^no metric 'sim'; choose from ssim"):
        select_metrics(["ssim", "sim"])


def test_bootstrap_resamples_subjects_reproducibly():
    values, subjects = np.arange(12.0), ["a"] * 6 + ["b"] * 3 + ["c"] * 3
    first, again = (bootstrap_mean(values, subjects, seed=3) for _ in range(2))
    assert first == again
    assert first.mean == 5.5 and first.num_subjects == 3 and first.num_images == 12
    assert first.low >= values[:6].mean() and first.high <= values[9:].mean()


def test_bootstrap_in_blocks_gives_the_numbers_of_one_block(monkeypatch):
    values, subjects = np.random.default_rng(0).normal(size=60), [f"s{i // 3}" for i in range(60)]
    whole = bootstrap_mean(values, subjects), bootstrap_ratio(values + 5, values + 9, subjects)
    monkeypatch.setattr(bootstrap, "BLOCK_ELEMENTS", 20 * 7)  # 7 resamples of 20 subjects at once
    sizes = {len(block) for block in bootstrap.resamples(20, 2000, 0)}
    assert sizes == {7, 2000 % 7}
    assert whole == (bootstrap_mean(values, subjects), bootstrap_ratio(values + 5, values + 9, subjects))


def test_bootstrap_interval_is_wider_over_subjects_than_over_images():
    rng = np.random.default_rng(0)
    values = np.repeat(rng.normal(size=20), 25)
    by_subject = bootstrap_mean(values, [f"s{i // 25}" for i in range(500)])
    by_image = bootstrap_mean(values, [f"i{i}" for i in range(500)])
    assert by_subject.high - by_subject.low > 3 * (by_image.high - by_image.low)


def test_bootstrap_counts_excluded_and_gives_no_interval_for_one_subject():
    interval = bootstrap_mean(np.array([1.0, np.nan, 3.0]), ["a", "a", "a"])
    assert interval.as_dict() == {
        "mean": 2.0,
        "ci95": None,
        "std": pytest.approx(2**0.5),
        "n": 2,
        "num_subjects": 1,
        "num_excluded": 1,
    }


def line(column: int, spatial_dims: int = 2) -> torch.Tensor:
    edges = torch.zeros(1, 1, *(16,) * spatial_dims)
    edges[..., column] = 1
    return edges


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize(("shift", "tolerance", "expected"), [(0, 1, 1), (1, 1, 1), (2, 1, 0), (2, 2, 1)])
def test_edge_f1_forgives_a_shift_within_tolerance(spatial_dims, shift, tolerance, expected):
    found, wanted = line(5 + shift, spatial_dims), line(5, spatial_dims)
    assert float(edge_f1(found, wanted, tolerance=tolerance)) == pytest.approx(expected)


def test_edge_f1_by_hand_and_empty_maps():
    both, empty = torch.maximum(line(3), line(10)), torch.zeros(1, 1, 16, 16)
    assert float(edge_f1(both, line(3), tolerance=1)) == pytest.approx(2 / 3)  # precision 1/2, recall 1
    assert float(edge_f1(empty, line(3), tolerance=1)) == 0
    assert edge_f1(empty, empty, tolerance=1).isnan().all()
