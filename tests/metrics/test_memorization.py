"""Copies of training images are found, new images are not taken for copies."""

import pytest
import torch

from medldm.metrics.memorization import memorized_share, nearest_distance, thumbnails


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


def test_the_memorized_share_is_the_quantile_for_like_sets_and_one_for_copies():
    real = torch.rand(20_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    other = torch.rand(20_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert memorized_share(other, real) == pytest.approx(0.05, abs=0.005)
    assert memorized_share(torch.zeros(10), real) == 1
