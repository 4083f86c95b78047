"""Copies of training images are found, new images are not taken for copies."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from medldm.evaluation.measure import measure_nearest
from medldm.evaluation.tools import Tools
from medldm.metrics import memorization
from medldm.metrics.memorization import (
    audit_copies,
    memorized_share,
    nearest_correlation,
    nearest_distance,
    nearest_training,
    thumbnail_shape,
    thumbnails,
)


@pytest.mark.parametrize("shape", [(64, 48), (20, 24, 28)])
def test_a_copy_lies_at_zero_and_a_shade_at_its_difference(shape):
    train = torch.rand(9, 1, *shape, generator=torch.Generator().manual_seed(0))
    images = torch.stack([train[4], train[7] + 0.125])
    got = nearest_distance(thumbnails(images), thumbnails(train))
    # Block means of independent noise lie closer to one another than the shade is wide, or not at all nearer.
    assert got[0] == 0 and 0 < got[1] <= 0.125 + 1e-6


def test_the_nearest_of_several_parts_is_the_nearest_of_all(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images, train = torch.randn(5, 7, generator=generator), torch.randn(30, 7, generator=generator)
    expected = ((images[:, None] - train) ** 2).mean(2).sqrt().amin(1)
    monkeypatch.setattr("medldm.metrics.memorization.CHUNK_BYTES", 4 * 5 * 8)  # eight at a time
    torch.testing.assert_close(nearest_distance(images, train), expected)


def scans(num: int, seed: int, spatial_dims: int = 2) -> torch.Tensor:
    """Smooth images of one anatomy, 64 pixels or 32 voxels a side: what all share, and each one's own."""
    size = {2: 64, 3: 32}[spatial_dims]
    shape = (size,) * spatial_dims
    common = gaussian_filter(np.random.default_rng(99).normal(size=shape), 6)
    own = gaussian_filter(np.random.default_rng(seed).normal(size=(num, *shape)), (0, *[4] * spatial_dims))
    images = common / common.std() + own / own.std()
    return torch.from_numpy(images[:, None] / 4).float().clamp(-1, 1)


def noisy(x: torch.Tensor) -> torch.Tensor:
    return x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


CHANGES = {
    "exact": lambda x: x,
    "mirrored": lambda x: x.flip(-1),
    "upside down": lambda x: x.flip((-1, -2)),
    "shifted": lambda x: x.roll((2, -2), (-1, -2)),
    "noisy": noisy,
    "re-windowed": lambda x: (0.5 * x + 0.3).clamp(-1, 1),
    "all of these": lambda x: noisy((0.6 * x - 0.1).flip(-1).roll(2, -1)),
}


def correlations(images: torch.Tensor, train: torch.Tensor) -> torch.Tensor:
    return nearest_correlation(images, thumbnails(train).view(-1, *thumbnail_shape(train.shape[1:])))


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("change", CHANGES)
def test_planted_copies_are_found_however_they_were_changed(change, spatial_dims):
    """A tenth of 40 images are copies: all four are found, and of the others none."""
    train, real, made = (scans(40, seed, spatial_dims) for seed in (1, 2, 3))
    made[:4] = CHANGES[change](train[10:14])
    values = correlations(made, train)
    audit = audit_copies(values, correlations(real, train))
    assert (values[:4] > audit.threshold).all()
    assert audit.num_copies <= 4 + 2 and audit.false_positive_rate == 1 / 41


def test_held_out_images_are_called_copies_at_the_stated_rate():
    train = scans(40, 1)
    sets = ((scans(20, 10 + i), scans(19, 60 + i)) for i in range(30))
    values = ([correlations(images, train) for images in both] for both in sets)
    counts = [audit_copies(*both).num_copies for both in values]
    assert sum(counts) / (30 * 20) < 0.09  # 1 / 20 in the mean over draws


def test_a_constant_image_correlates_with_nothing_and_a_tiny_one_is_refused():
    train = torch.rand(3, 1, 8, 8)
    assert nearest_correlation(torch.zeros(1, 1, 8, 8), train).item() == 0
    with pytest.raises(ValueError, match="too small to be shifted"):
        nearest_correlation(train[..., :4], train[..., :4])


def test_the_memorized_share_is_the_quantile_for_like_sets_and_one_for_copies():
    real = torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    other = torch.rand(20_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert memorized_share(other, real) == pytest.approx(0.05, abs=0.005)
    assert memorized_share(torch.zeros(10), real) == 1


def test_squared_distances_of_embeddings_are_at_most_lpips(published_weights):
    """The mean over space comes before the square there: Jensen's inequality bounds it."""
    from medldm.networks.lpips import LPIPS

    network = LPIPS("alex")
    x, y = (scans(4, seed)[..., :64, :64] for seed in (1, 2))
    with torch.no_grad():
        embedded = [network.embed(images) for images in (x, y)]
        squared, lpips = ((embedded[0] - embedded[1]) ** 2).sum(1), network(x, y)
        assert (squared <= lpips + 1e-6).all() and (squared > 0.01 * lpips).all()
        mirrored_copy = network.embed(x.flip(-1).flip(-1))
    assert torch.equal(mirrored_copy, embedded[0]) and embedded[0].shape == (4, network.num_features)


@pytest.mark.parametrize("axial_axis", [None, 1])
def test_a_mirrored_training_image_lies_at_zero_in_perceptual_space(published_weights, axial_axis):
    from medldm.networks.lpips import LPIPS

    tools = Tools({}, recipe=None, lpips=LPIPS("alex"), axial_axis=axial_axis)
    train = scans(5, 1, 2 if axial_axis is None else 3)
    with torch.no_grad():
        tools.train_embeddings = {"perceptual": {tuple(train.shape[1:]): tools.embed(train)}}
        tools.train_thumbnails = {tuple(train.shape[1:]): thumbnails(train)}
        found = measure_nearest(torch.cat([train[2:3].flip(-1), scans(1, 7, train.ndim - 2)]), tools)
    assert found["nearest_train_perceptual"][0] < 1e-9 < 1e-3 < found["nearest_train_perceptual"][1]


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_copy_that_is_shifted_by_half_a_pixel_of_the_thumbnail_correlates_fully(spatial_dims):
    """A voxel of 32, or one pixel of 64, along every axis; noise hides nothing that whole pixels align."""
    generator = torch.Generator().manual_seed(0)
    size = {2: 64, 3: 32}[spatial_dims]
    train = torch.rand(6, 1, *(size,) * spatial_dims, generator=generator)
    axes = tuple(range(-spatial_dims, 0))
    distances = [1 if axis % 2 else -1 for axis in axes]
    copies = train[2:4].roll(distances, axes).flip(-1)
    known = thumbnails(train).view(-1, *thumbnail_shape(train.shape[1:]))
    values, index = nearest_training(copies, known)
    assert index.tolist() == [2, 3] and (values > 0.9999).all()
    others = nearest_correlation(torch.rand(2, 1, *(size,) * spatial_dims, generator=generator), known)
    assert (others < 0.5).all()


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_many_images_are_compared_a_few_at_a_time(spatial_dims, monkeypatch):
    """Four of them where the candidates of four, in every mirroring, fill the bytes; the same is found."""
    images, train = scans(9, seed=1, spatial_dims=spatial_dims), scans(20, seed=2, spatial_dims=spatial_dims)
    known = thumbnails(train).view(-1, *thumbnail_shape(train.shape[1:]))
    expected, table_of, numbers = nearest_training(images, known), memorization.whole_shifts, []
    values = 16 * {2: 30**2, 3: 14**3}[spatial_dims]  # of the candidates of an image
    monkeypatch.setattr(memorization, "CHUNK_BYTES", 4 * 4 * 2**spatial_dims * values)

    def counted(small, others):
        numbers.append(len(small))
        return table_of(small, others)

    monkeypatch.setattr(memorization, "whole_shifts", counted)
    torch.testing.assert_close(nearest_training(images, known), expected)
    assert numbers == [4, 4, 1]


class Pool3(torch.nn.Module):
    """Stands in for Inception: 2,048 features that turn with the mean of the image; counts its passes."""

    num_features, passes = 2048, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        angle = x.flatten(1).mean(1)
        return torch.nn.functional.pad(torch.stack([angle.cos(), angle.sin()], 1) * 7, (0, 2046))


@pytest.mark.parametrize("is_known", [False, True])
def test_the_distance_in_inception_space_is_two_less_twice_the_cosine(is_known):
    network = Pool3()
    tools = Tools({}, recipe=None, networks={"inception": network})
    train = torch.stack([torch.full((1, 16, 16), value) for value in (0.0, 1.0)])
    assert list(tools.embedders()) == ["inception"]
    tools.train_embeddings = {"inception": {(1, 16, 16): tools.embed_by_inception(train)}}
    tools.train_thumbnails = {(1, 16, 16): thumbnails(train)}
    images = train + torch.tensor([0.0, 0.25]).view(2, 1, 1, 1)
    features = {"inception": network(images)} if is_known else None
    found = measure_nearest(images, tools, features)["nearest_train_inception"]
    assert found == pytest.approx([0, 2 - 2 * np.cos(0.25)], abs=1e-6)
    assert network.passes == 2  # one of the training images, one of these


def test_other_layers_of_inception_are_not_taken_for_pool3():
    tools = Tools({}, recipe=None, networks={"inception": Pool3()}, fid_features=(64, 192))
    assert tools.inception_key is None and tools.embedders() == {}
    tools.fid_features = (64, 2048)
    features = torch.cat([torch.full((1, 64), 9.0), torch.ones(1, 2048)], 1)
    embedded = tools.embed_by_inception(torch.zeros(1, 1, 8, 8), features)
    torch.testing.assert_close(embedded, torch.full((1, 2048), 2048**-0.5))
