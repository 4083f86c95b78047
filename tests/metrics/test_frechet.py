import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torchmetrics.image.kid import poly_mmd

from medldm.errors import InputError
from medldm.metrics.frechet import (
    FrechetDistance,
    accumulate,
    frechet_distance,
    frechet_from_features,
    kernel_distance,
    polynomial_mmd,
)
from medldm.networks import features as feature_nets
from medldm.networks.features import LPIPS, RandomConvFeatures, build_features, to_uint8


def gaussian_features(num: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.randn(num, size, generator=generator, dtype=torch.float64) @ mixing + seed


def scipy_frechet(x: np.ndarray, y: np.ndarray) -> float:
    c1, c2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(c1 @ c2)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * root.real))


def test_frechet_equals_scipy_sqrtm():
    x, y = gaussian_features(200, 16, 1), gaussian_features(150, 16, 2)
    assert frechet_from_features(x, y) == pytest.approx(scipy_frechet(x.numpy(), y.numpy()), rel=1e-6)


@pytest.mark.parametrize("num", [10, 400])
def test_frechet_of_a_set_with_itself_is_zero(num):
    x = gaussian_features(num, 64, 3)
    assert frechet_from_features(x, x) < 1e-7 * float(x.var(0).sum())


def test_frechet_with_fewer_images_than_features_equals_the_moment_form():
    x, y = gaussian_features(12, 40, 1), gaussian_features(17, 40, 2)
    m1, m2 = accumulate(x), accumulate(y)
    expected = frechet_distance(m1.mean, m1.covariance, m2.mean, m2.covariance)
    assert frechet_from_features(x, y) == pytest.approx(float(expected), rel=1e-6)


def test_frechet_sees_a_shift_of_the_mean():
    x = gaussian_features(100, 8)
    assert frechet_from_features(x, x + 3) == pytest.approx(8 * 9, rel=1e-9)


def test_frechet_of_two_gaussians_in_closed_form():
    v1, v2 = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 1.0]).double()
    distance = frechet_distance(torch.zeros(3), v1.diag(), torch.tensor([2.0, 0, 0]), v2.diag())
    assert float(distance) == pytest.approx(4 + float(((v1.sqrt() - v2.sqrt()) ** 2).sum()), rel=1e-12)


class Flatten(nn.Module):
    def forward(self, x):
        return x.flatten(1)


@pytest.mark.parametrize("shape", [(1, 3, 4), (1, 2, 3, 2)])
def test_streaming_metric_equals_torchmetrics_formula(shape):
    from torchmetrics.image.fid import _compute_fid

    generator = torch.Generator().manual_seed(0)
    generated, reference = (torch.randn(60, *shape, generator=generator) for _ in range(2))
    metric = FrechetDistance(Flatten(), num_features=12)
    for part in range(0, 60, 20):
        metric.update(generated[part : part + 20], reference[part : part + 20])
    x, y = (images.flatten(1).double() for images in (generated, reference))
    expected = _compute_fid(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert float(metric.compute()) == pytest.approx(float(expected), rel=1e-6)
    assert int(metric.generated_count) == 60


def test_streaming_metric_needs_two_images():
    metric = FrechetDistance(Flatten(), num_features=4)
    metric.update(torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2))
    with pytest.raises(InputError, match="two images"):
        metric.compute()


def test_polynomial_mmd_equals_torchmetrics():
    x, y = gaussian_features(30, 8, 1), gaussian_features(30, 8, 2)
    assert float(polynomial_mmd(x, y)) == pytest.approx(float(poly_mmd(x, y)), rel=1e-9)


def test_kernel_distance_is_unbiased_and_seeded():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(400, 16, generator=generator) for _ in range(2))
    whole = kernel_distance(x, y)
    assert abs(whole.mean) < 0.02 and whole.std is None and whole.subset_size == 400
    first, again = (kernel_distance(x, y, subset_size=50, num_subsets=20, seed=1) for _ in range(2))
    assert first == again and first.num_subsets == 20 and first.std > 0


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_random_conv_is_the_same_network_everywhere(spatial_dims):
    x = torch.randn(3, 1, *(16,) * spatial_dims, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(1)
    first = build_features("random_conv", spatial_dims=spatial_dims)
    torch.manual_seed(2)
    again = RandomConvFeatures(spatial_dims)
    assert torch.equal(first(x), again(x)) and first.sha256 == again.sha256
    assert first(x).shape == (3, first.num_features)


def test_eight_bit_conversion_rounds_and_clamps():
    assert to_uint8(torch.tensor([-2.0, -1.0, -0.0008, 0.0, 0.997, 1.0, 2.0])).tolist() == [
        0,
        0,
        127,
        128,
        255,
        255,
        255,
    ]


def test_missing_inception_weights_say_which_file_to_put_where(tmp_path):
    with pytest.raises(InputError) as caught:
        build_features("inception", spatial_dims=2, weights_dir=tmp_path)
    message = str(caught.value)
    assert "pt_inception-2015-12-05-6726825d.pth" in message and str(tmp_path) in message
    assert "\n" not in message


def test_other_weights_never_pass_for_inception(tmp_path):
    (tmp_path / "pt_inception-2015-12-05-6726825d.pth").write_bytes(b"something else")
    with pytest.raises(InputError, match="sha256 does not start with 6726825d"):
        build_features("inception", spatial_dims=2, weights_dir=tmp_path)


def test_unfit_or_unknown_networks_are_named():
    with pytest.raises(InputError, match="inception takes 2D images, these are 3D"):
        build_features("inception", spatial_dims=3)
    with pytest.raises(InputError, match="no network 'resnet'"):
        build_features("resnet", spatial_dims=2)


def test_inception_loads_local_weights_and_gives_2048_features(tmp_path, monkeypatch):
    import torch_fidelity.feature_extractor_inceptionv3 as source

    path = tmp_path / "weights-inception-2015-12-05-6726825d.pth"
    weights = feature_nets.INCEPTION_WEIGHTS._replace(sha256="")
    monkeypatch.setattr(feature_nets, "INCEPTION_WEIGHTS", weights)
    monkeypatch.setattr(source, "load_state_dict_from_url", lambda *_, **__: pytest.fail("downloads"))
    skeleton = nn.Module.__new__(source.FeatureExtractorInceptionV3)
    with monkeypatch.context() as patch:
        patch.setattr(source.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(source.torch, "load", lambda *_, **__: {})
        skeleton.__init__("random", ["2048"], feature_extractor_weights_path="none")
    torch.save(skeleton.state_dict(), path)
    network = build_features("inception", spatial_dims=2, weights_dir=tmp_path)
    assert network(torch.rand(2, 1, 32, 32) * 2 - 1).shape == (2, 2048)
    assert network.sha256 == feature_nets.file_sha256(path)


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_lpips_names_its_missing_file(net, tmp_path):
    with pytest.raises(InputError, match=feature_nets.LPIPS_WEIGHTS[net].names[0]):
        LPIPS(net, weights_dir=tmp_path)


def test_lpips_loads_a_torchvision_file(tmp_path, monkeypatch):
    import torchvision

    weights = {"alex": feature_nets.LPIPS_WEIGHTS["alex"]._replace(sha256="")}
    monkeypatch.setattr(feature_nets, "LPIPS_WEIGHTS", weights)
    backbone = torchvision.models.alexnet(weights=None)
    torch.save(backbone.state_dict(), tmp_path / "alexnet-owt-7be5be79.pth")
    lpips = LPIPS("alex", weights_dir=tmp_path).train()
    assert torch.equal(lpips.network.net.slice1[0].weight, backbone.features[0].weight)
    assert not lpips.network.training
    x = torch.rand(2, 1, 64, 64) * 2 - 1
    assert torch.equal(lpips(x, x), torch.zeros(2))
    assert (lpips(x, x.flip(0)) > 0).all()
