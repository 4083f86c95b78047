"""Comparisons of sets: values known in closed form, tests of a difference, and what n does to a distance."""

import numpy as np
import pytest
import torch

from medldm.evaluation.distances import FeatureSets, compare_sets, frechet_by_n
from medldm.metrics.frechet import frechet_from_features, kernel_distance, polynomial_mmd
from medldm.metrics.manifold import expected_coverage, manifold_scores
from medldm.metrics.permutation import kernel_test, p_value, sign_test


def normal(num: int, size: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, size, generator=generator, dtype=torch.float64) + shift


def test_density_and_coverage_of_one_gaussian_are_their_known_means():
    """Naeem et al. 2020, Lemmas 1 and 2: 1, and 1 less a ratio of factorials, whatever the distribution."""
    scores = [manifold_scores(normal(200, 8, 2 * i), normal(200, 8, 2 * i + 1)) for i in range(20)]
    assert np.mean([s.density for s in scores]) == pytest.approx(1, abs=0.03)
    assert expected_coverage(10**6, 10**6) == pytest.approx(1 - 2**-5, abs=1e-6)
    assert np.mean([s.coverage for s in scores]) == pytest.approx(expected_coverage(200, 200), abs=0.006)
    gap = np.mean([s.precision for s in scores]) - np.mean([s.recall for s in scores])
    assert gap == pytest.approx(0, abs=0.02)


def test_density_and_coverage_by_hand():
    """The fifth neighbours of 0..6 lie 5, 4, 3, 3, 3, 4 and 5 away: of their balls, that of 0 alone reaches
    -5, and its border belongs to it.
    """
    real = torch.arange(7.0)[:, None]
    scores = manifold_scores(torch.full((6, 1), -5.0), real)
    assert (scores.density, scores.coverage) == (pytest.approx(1 / 5), pytest.approx(1 / 7))
    assert manifold_scores(torch.full((6, 1), -5.01), real)[2:] == (0, 0)
    assert expected_coverage(7, 3, k=2) == pytest.approx(1 - 6 / 9 * 5 / 8)


def test_manifold_scores_tell_narrow_far_and_equal_sets_apart():
    real = normal(100, 4, 0)
    assert manifold_scores(real, real)[:2] == (1, 1)
    assert manifold_scores(real + 1000, real) == (0, 0, 0, 0)
    narrow = manifold_scores(0.1 * normal(100, 4, 1), real)
    assert narrow.precision == 1 and narrow.recall < 0.1 and narrow.density > 1.2 and narrow.coverage < 0.5
    with pytest.raises(ValueError, match="more than 5 images a side"):
        manifold_scores(real[:5], real)


def test_blocks_do_not_change_manifold_scores(monkeypatch):
    from medldm.metrics import manifold

    made, real = normal(60, 4, 0), normal(50, 4, 1, 0.5)
    whole = manifold_scores(made, real)
    monkeypatch.setattr(manifold, "BLOCK_ROWS", 7)
    assert manifold_scores(made, real) == whole


def test_the_frechet_distance_of_two_gaussians_comes_to_its_closed_form():
    """|mu|^2 + sum (s1 - s2)^2 of diagonal Gaussians: 8 * 0.25 + 8 * 1 = 10."""
    distance = frechet_from_features(normal(20000, 8, 0), 2 * normal(20000, 8, 1) + 0.5)
    assert distance == pytest.approx(10, rel=0.02)


def test_the_kernel_distance_of_two_gaussians_comes_to_its_closed_form():
    """In one dimension E (x y + 1)^3 = E x^3 E y^3 + 3 E x^2 E y^2 + 3 E x E y + 1 of independent x and y:
    the squared MMD is the sum of the squared differences of moments times 3, 3, 1.
    """
    mean = 0.5  # moments of N(0, 1): 0, 1, 0; of N(m, 1): m, 1 + m^2, 3 m + m^3
    expected = 3 * mean**2 + 3 * mean**4 + (3 * mean + mean**3) ** 2
    x, y = normal(5000, 1, 0), normal(5000, 1, 1, mean)
    assert kernel_distance(x, y, subset_size=5000).mean == pytest.approx(expected, rel=0.1)


def test_the_bias_of_a_frechet_distance_falls_as_n_grows():
    """Two samples of one Gaussian in 512 dimensions: 657 at n = 100, 44 at n = 3,000; the truth is 0."""
    few = frechet_from_features(normal(100, 512, 0), normal(100, 512, 1))
    many = frechet_from_features(normal(3000, 512, 2), normal(3000, 512, 3))
    assert few == pytest.approx(657, rel=0.02) and many == pytest.approx(44, rel=0.02)
    table = frechet_by_n(normal(400, 64, 0), normal(400, 64, 1), seed=0, distance=frechet_from_features)
    whole = frechet_from_features(normal(400, 64, 0), normal(400, 64, 1))
    assert list(table) == ["100", "200"] and table["100"] > table["200"] > whole


def test_the_tested_statistic_is_the_kernel_distance_and_its_p_values_are_uniform_for_equal_sets():
    groups = [str(i // 3) for i in range(60)]
    values = []
    for i in range(60):
        generator = torch.Generator().manual_seed(i)
        subject = torch.randn(20, 4, generator=generator, dtype=torch.float64).repeat_interleave(3, 0)
        x, y = (subject + torch.randn(60, 4, generator=generator, dtype=torch.float64) for _ in range(2))
        values.append(kernel_test(x, y, groups, num=99, seed=i))
    assert 0.35 < np.mean(values) < 0.65 and np.mean(np.array(values) <= 0.1) < 0.25
    assert kernel_test(x, y + 1, groups, num=99) == 0.01
    assert kernel_test(x, x, groups, num=99) == 1


def test_a_kernel_test_permutes_as_moving_the_images_would():
    x, y = normal(6, 3, 0), normal(6, 3, 1, 0.3)
    groups = ["a", "a", "b", "b", "c", "c"]
    from medldm.metrics.permutation import exchanges

    change = torch.from_numpy(exchanges(groups, 50, 3))
    moved = [(torch.where(c[:, None], y, x), torch.where(c[:, None], x, y)) for c in change]
    values = [float(polynomial_mmd(*sides)) for sides in moved]
    assert kernel_test(x, y, groups, num=50, seed=3) == p_value(np.array(values), float(polynomial_mmd(x, y)))


def test_a_sign_test_exchanges_subjects_and_not_images():
    values = np.ones(40)
    alone = sign_test(values, [str(i) for i in range(40)], num=999)
    three = sign_test(values, [str(i % 3) for i in range(40)], num=999)
    assert alone == 0.001 and three == pytest.approx(0.25, abs=0.05)  # of 8 orders two are as extreme


def test_distances_of_a_set_come_with_n_a_test_and_fewer_images():
    made, real = normal(40, 6, 0, 0.5), normal(40, 6, 1)
    sets, kernel = FeatureSets(made, real, [str(i // 4) for i in range(40)]), {"subset_size": 100}
    scores = compare_sets(sets, "random_conv", kernel, seed=0)
    assert set(scores["frechet_random_conv"]["by_n"]) == {"10", "20"}
    assert scores["kernel_random_conv"]["p_value"] < 0.05
    assert scores["kernel_random_conv"]["num_tested_subjects"] == 10
    assert 0 <= scores["coverage_random_conv"]["value"] <= 1 and scores["recall_random_conv"]["n"] == 40
    halves = compare_sets(sets._replace(is_paired=False), "random_conv", kernel, seed=0)
    assert "p_value" not in halves["kernel_random_conv"]
