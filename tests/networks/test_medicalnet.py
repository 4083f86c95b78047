"""MedicalNet's networks: published file names load, and the perceptual loss sees intensity."""

import pytest
import torch

from medldm.errors import InputError
from medldm.losses import PerceptualLoss, unit_feature_distance
from medldm.networks.features import build_medicalnet
from medldm.networks.medicalnet import MedicalNet, standardised


@pytest.fixture(scope="module")
def weights_dir(tmp_path_factory):
    """A file as Tencent publishes it: names with `module.`, inside `state_dict`, with a segmentation head."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    state = {f"module.{key}": value for key, value in MedicalNet(10).state_dict().items()}
    state["module.conv_seg.0.weight"] = torch.zeros(3)
    torch.save({"state_dict": state}, folder / "resnet_10_23dataset.pth")
    return folder


@pytest.mark.parametrize(("depth", "num_features"), [(10, 512), (50, 2048)])
def test_names_and_shapes_are_those_of_monai_which_loads_the_published_files(depth, num_features):
    import monai.networks.nets as nets

    options = {"spatial_dims": 3, "n_input_channels": 1, "feed_forward": False, "shortcut_type": "B"}
    with torch.device("meta"):
        network = MedicalNet(depth)
        theirs = getattr(nets, f"resnet{depth}")(pretrained=False, bias_downsample=False, **options)
    shapes = [{k: tuple(v.shape) for k, v in net.state_dict().items()} for net in (network, theirs)]
    assert shapes[0] == shapes[1]
    assert network.num_features == num_features


def test_features_lie_on_an_eighth_of_the_grid():
    assert MedicalNet(10).eval()(torch.zeros(1, 1, 16, 24, 20)).shape == (1, 512, 2, 3, 3)


def test_a_published_file_loads_frozen(weights_dir):
    network = build_medicalnet(10, weights_dir)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert len(network.sha256) == 64


def test_a_missing_or_foreign_file_is_one_line(weights_dir, tmp_path):
    with pytest.raises(InputError, match="resnet_50_23dataset.pth: not found; put the file in"):
        build_medicalnet(50, weights_dir)
    torch.save({"state_dict": {"x": torch.zeros(1)}}, tmp_path / "resnet_10.pth")
    with pytest.raises(InputError, match=r"resnet_10.pth: not the weights of MedicalNet's ResNet-10"):
        build_medicalnet(10, tmp_path)


def test_standardised_volumes_have_mean_0_and_deviation_1():
    x = standardised(torch.randn(2, 1, 4, 5, 6) * 3 + 7)
    torch.testing.assert_close(x.mean((1, 2, 3, 4)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.flatten(1).std(1, unbiased=False), torch.ones(2))
    assert (standardised(torch.full((1, 1, 2, 2, 2), -1.0)) == 0).all()


def test_the_distance_of_orthogonal_unit_features_is_two():
    a, b = torch.zeros(1, 4, 2, 2, 2), torch.zeros(1, 4, 2, 2, 2)
    a[:, 0], b[:, 1] = 5.0, 0.1
    assert unit_feature_distance(a, b).item() == pytest.approx(2.0)


def test_the_perceptual_loss_sees_more_than_signs(weights_dir):
    """ALDM divided one-channel volumes by their channel norm: x / |x|, and lost all intensities."""
    loss = PerceptualLoss("medicalnet_10", weights_dir=str(weights_dir))
    torch.manual_seed(1)
    x = torch.rand(1, 1, 16, 16, 16) + 0.1
    x_hat = (x.square() + 0.1).requires_grad_()  # same signs
    value = loss(x_hat, x)
    value.backward()
    assert value > 1e-3 and x_hat.grad.abs().sum() > 0
    assert loss(x, x).item() == pytest.approx(0, abs=1e-9)
    assert not loss.state_dict()
