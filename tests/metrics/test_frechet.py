import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torchmetrics.image.kid import poly_mmd

from medldm.batch import to_uint8
from medldm.data.preparation.edges import EdgeRecipe
from medldm.errors import InputError
from medldm.evaluation import tools as tools_module
from medldm.evaluation.distances import distances
from medldm.evaluation.measure import measure
from medldm.evaluation.notes import FRECHET, warn_small
from medldm.evaluation.pairs import Pair
from medldm.evaluation.results import describe_networks
from medldm.evaluation.tools import build_tools
from medldm.fingerprints import file_sha256
from medldm.metrics.frechet import (
    FrechetDistance,
    accumulate,
    frechet_distance,
    frechet_from_features,
    kernel_distance,
    polynomial_mmd,
)
from medldm.networks import features as feature_nets
from medldm.networks import lpips as lpips_module
from medldm.networks.features import (
    MANIFOLD_NAMES,
    RandomConvFeatures,
    build_features,
    check_fid_features,
)
from medldm.networks.lpips import LPIPS


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


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """A folder with Inception weights of no training, in the file that the true ones have."""
    import torch_fidelity.feature_extractor_inceptionv3 as source

    folder = tmp_path_factory.mktemp("weights")
    skeleton = nn.Module.__new__(source.FeatureExtractorInceptionV3)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        patch.setattr(source.torch, "load", lambda *_, **__: {})
        skeleton.__init__("random", ["2048"], feature_extractor_weights_path="none")
    torch.save(skeleton.state_dict(), folder / "weights-inception-2015-12-05-6726825d.pth")
    return folder


@pytest.fixture
def inception_folder(random_inception, monkeypatch):
    import torch_fidelity.feature_extractor_inceptionv3 as source

    weights = feature_nets.INCEPTION_WEIGHTS._replace(sha256="")
    monkeypatch.setattr(feature_nets, "INCEPTION_WEIGHTS", weights)
    monkeypatch.setattr(source, "load_state_dict_from_url", lambda *_, **__: pytest.fail("downloads"))
    return random_inception


def test_inception_loads_local_weights_and_gives_2048_features(inception_folder):
    network = build_features("inception", spatial_dims=2, weights_dir=inception_folder)
    assert network(torch.rand(2, 1, 32, 32) * 2 - 1).shape == (2, 2048)
    path = inception_folder / "weights-inception-2015-12-05-6726825d.pth"
    assert network.sha256 == file_sha256(path)


FID_FEATURES = (64, 2048, 192, 768)


def measured_by(inception_folder, generated, real, by_slice=False):
    """What an evaluation says of these images (N, 1, H, W), or of their slices along D of (N, 1, D, H, W):
    the distances of `generated`, the networks, and how often Inception was called.
    """
    pairs = [
        Pair(str(i), str(i), x, [y], None, None, None, None, {})
        for i, (x, y) in enumerate(zip(real, generated, strict=True))
    ]
    tools = build_tools(
        {},
        recipe=EdgeRecipe(),
        view_names=(),
        tolerances=(),
        networks=["inception"],
        lpips=None,
        weights_dir=inception_folder,
        image_shape=real[0].shape,
        axial_axis=0 if by_slice else None,
        num_slices=2,
        fid_features=FID_FEATURES,
    )
    calls = []
    tools.networks["inception" + "_slices" * by_slice].register_forward_hook(lambda *_: calls.append(1))
    measured = measure(pairs, {"generated": list(generated)}, tools, lambda _: None)
    kernel = {"num_subsets": 1, "subset_size": 100}
    table = distances(measured, [pair.subject for pair in pairs], np.ones(len(pairs), bool), kernel, 0)
    return table, describe_networks(tools), len(calls)


def test_one_pass_of_inception_gives_the_distances_of_all_its_layers_as_torch_fidelity_does(inception_folder):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    generator = torch.Generator().manual_seed(0)
    real = torch.rand(4, 1, 8, 8, generator=generator).numpy() * 2 - 1
    made = 0.5 * real + 0.2
    table, networks, num_calls = measured_by(inception_folder, made, real)
    path = inception_folder / "weights-inception-2015-12-05-6726825d.pth"
    layers = [str(size) for size in FID_FEATURES]
    theirs = FeatureExtractorInceptionV3("x", layers, feature_extractor_weights_path=path)
    images = torch.from_numpy(np.concatenate([made, real]))
    sides = zip(*(x.double().split(4) for x in theirs(to_uint8(images).expand(-1, 3, -1, -1))), strict=True)
    assert num_calls == 2  # generated and real
    for size, ours, reference in zip(FID_FEATURES, *sides, strict=True):
        suffix = "" if size == 2048 else f"_{size}"
        expected = frechet_from_features(ours, reference)
        if size < 768:  # their matrix square root of more takes many seconds
            statistics = [fid_features_to_statistics(x) for x in (ours, reference)]
            fidelity = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
            assert expected == pytest.approx(fidelity, rel=1e-3)
        score = table["generated"][f"fid{suffix}"]
        assert score["value"] == pytest.approx(expected, rel=1e-4), size
        assert score["n"] == score["n_reference"] == 4
        kernel = kid_features_to_metric(ours, reference, kid_subsets=1, kid_subset_size=4, verbose=False)
        mean = kernel["kernel_inception_distance_mean"]
        assert table["generated"][f"kid{suffix}"]["value"] == pytest.approx(mean, rel=1e-4, abs=1e-9)
        assert networks[f"fid{suffix}"]["num_features"] == size
    assert networks.keys() - table["generated"].keys() == set(MANIFOLD_NAMES)  # four images are too few
    lines = warn_small(table, networks)
    names = [line.partition(" is below")[0] for line in lines]
    assert names == ["fid_64: n = 4", "fid: n = 4", "fid_192: n = 4", "fid_768: n = 4"]


class AllLayers(nn.Module):
    """As many numbers of an image as Inception's layers give together."""

    sha256, num_features = "0", sum(FID_FEATURES)

    def forward(self, x):
        return x.flatten(1)[:, :4] @ torch.linspace(-1, 1, 4 * self.num_features).cos().view(4, -1)


def test_slices_of_volumes_have_the_distances_of_all_layers_too(monkeypatch):
    monkeypatch.setattr(tools_module, "build_features", lambda *_, **__: AllLayers())
    real = np.random.default_rng(0).uniform(-1, 1, (3, 1, 2, 4, 4)).astype(np.float32)
    table, networks, num_calls = measured_by(None, real * 0.5, real, by_slice=True)
    assert num_calls == 2
    sides = [AllLayers()(torch.from_numpy(x[:, 0].reshape(6, 1, 4, 4))) for x in (real * 0.5, real)]
    for size, ours, reference in zip(FID_FEATURES, *(x.split(FID_FEATURES, 1) for x in sides), strict=True):
        name = ("fid" if size == 2048 else f"fid_{size}") + "_slices"
        score = table["generated"][name]
        assert score["n"] == 6 and score["n_volumes"] == 3
        assert score["value"] == pytest.approx(frechet_from_features(ours, reference), rel=1e-6)
        assert f"{size}-d" in networks[name]["network"] and "of axial slices" in networks[name]["network"]


@pytest.mark.parametrize(
    ("n", "said"), [(63, "63 is below the 64"), (64, "64 is no more than the 64"), (65, None)]
)
def test_a_frechet_distance_of_no_more_images_than_features_is_said_to_be_singular(n, said):
    networks = {"fid_64": {"num_features": 64, "estimator": FRECHET}}
    lines = warn_small({"generated": {"fid_64": {"n": 200, "n_reference": n}}}, networks)
    assert [said in line for line in lines] == [True] * (said is not None)
    halves = {"generated": {"fid_64": {"n": 120, "n_reference": 120}}}
    halves["real_halves"] = {"fid_64": {"n": 60, "n_reference": 60}}
    assert warn_small(halves, networks)[0].startswith("fid_64 of real_halves: n = 60 is below")


@pytest.mark.parametrize(
    ("sizes", "networks", "said"),
    [
        ([100], ["inception"], "give a list of 64, 192, 768, 2048"),
        (["64"], ["inception"], "give a list of"),
        (64, ["inception"], "give a list of"),
        ([], ["inception"], "give a list of"),
        (None, ["inception"], "give a list of"),
        ([64, 64], ["inception"], "name each once"),
        ([64], ["random_conv"], "only Inception has these"),
    ],
)
def test_features_that_inception_does_not_have_are_named(sizes, networks, said):
    with pytest.raises(ValueError, match="^fid_features=") as caught:
        check_fid_features(sizes, networks)
    assert said in str(caught.value)


def test_missing_weights_are_said_of_every_layer(tmp_path):
    tools = build_tools(
        {},
        recipe=EdgeRecipe(),
        view_names=(),
        tolerances=(),
        networks=["inception"],
        lpips=None,
        weights_dir=tmp_path,
        image_shape=(1, 8, 8),
        fid_features=[64, 768],
    )
    assert list(tools.missing) == ["fid_64", "kid_64", "fid_768", "kid_768"]


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_lpips_names_its_missing_file(net, tmp_path):
    with pytest.raises(InputError, match=lpips_module.LPIPS_WEIGHTS[net].names[0]):
        LPIPS(net, weights_dir=tmp_path)


def test_lpips_loads_a_torchvision_file(tmp_path, monkeypatch):
    import torchvision

    weights = {"alex": lpips_module.LPIPS_WEIGHTS["alex"]._replace(sha256="")}
    monkeypatch.setattr(lpips_module, "LPIPS_WEIGHTS", weights)
    backbone = torchvision.models.alexnet(weights=None)
    torch.save(backbone.state_dict(), tmp_path / "alexnet-owt-7be5be79.pth")
    lpips = LPIPS("alex", weights_dir=tmp_path).train()
    assert torch.equal(lpips.network.net.slice1[0].weight, backbone.features[0].weight)
    assert not lpips.network.training
    x = torch.rand(2, 1, 64, 64) * 2 - 1
    assert torch.equal(lpips(x, x), torch.zeros(2))
    assert (lpips(x, x.flip(0)) > 0).all()
