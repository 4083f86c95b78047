"""MS-SPADE: counts of the published releases, and a switch that keeps samples and classes apart."""

import pytest
import torch
import torch.nn.functional as F

from medldm.networks.discriminator import PatchDiscriminator
from medldm.networks.translator import MSSPADE, SwitchedSPADE
from tests.helpers import num_parameters

R3 = {"channels": [128, 256, 128], "hidden_channels": 64}
R1 = {"channels": [128], "hidden_channels": 128, "norm_on_shortcut": True}
R2 = {"channels": [64], "hidden_channels": 64, "conv_skip": True}


def build(spatial_dims: int = 3, num_classes: int = 3, **options) -> MSSPADE:
    torch.manual_seed(0)
    options = {"channels": [8, 6], "hidden_channels": 5, "latent_channels": 4} | options
    return MSSPADE(spatial_dims, num_classes=num_classes, **options)


@pytest.mark.parametrize(
    ("preset", "channels", "num_classes", "count"),
    [
        (R3, 4, 4, 18_932_428),
        (R3, 4, 3, 2_750_060 + 3 * 4_045_592),
        (R1, 3, 4, 11_141_839),
        (R2, 3, 4, 1_537_082),
    ],
)
def test_counts_are_those_of_the_releases(preset, channels, num_classes, count):
    with torch.device("meta"):
        assert (
            num_parameters(MSSPADE(3, latent_channels=channels, num_classes=num_classes, **preset)) == count
        )


def test_the_blocks_of_r3_have_their_counts():
    with torch.device("meta"):
        network = MSSPADE(3, latent_channels=4, num_classes=4, **R3)
    assert [num_parameters(block) for block in network.blocks] == [181_364, 6_671_232, 9_326_336, 2_753_496]


@pytest.mark.parametrize(
    ("channels_in", "channels_out", "grid", "count", "logits"),
    [
        (1, 1, (144, 192, 144), 2_771_873, (1, 1, 16, 22, 16)),
        (4, 5, (36, 48, 36), 2_843_557, (1, 5, 2, 4, 2)),
    ],
)
def test_discriminators_of_r3_have_their_counts_and_shapes(channels_in, channels_out, grid, count, logits):
    options = {"strides": [2, 2, 2, 1], "norm": "group", "out_channels": channels_out}
    with torch.device("meta"):
        network = PatchDiscriminator(3, channels=[32, 64, 128, 256], in_channels=channels_in, **options)
    narrow = PatchDiscriminator(3, channels=[1, 1, 1, 1], in_channels=1, **options)
    assert num_parameters(network) == count
    assert narrow(torch.zeros(1, 1, *grid))[-1].shape == logits


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_mixed_batch_equals_its_samples_one_by_one(spatial_dims):
    network = build(spatial_dims, norm_on_shortcut=True, conv_skip=True)
    z, label = torch.randn(5, 4, *(6,) * spatial_dims), torch.tensor([2, 0, 2, 1, 0])
    alone = torch.cat([network(z[i : i + 1], label[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(network(z, label), alone, atol=1e-5, rtol=1e-4)


def test_the_norm_is_the_published_formula():
    torch.manual_seed(0)
    spade = SwitchedSPADE(3, 4, num_classes=3, hidden_channels=5)
    x, k = torch.randn(2, 4, 5, 6, 7), 1
    shared, modulation = ((m.weight.unflatten(0, (3, -1))[k], m.bias.unflatten(0, (3, -1))[k])
                          for m in (spade.shared, spade.modulation))  # fmt: skip
    a = F.relu(F.conv3d(x, *shared, padding=1))
    gamma = F.conv3d(a, modulation[0][:4], modulation[1][:4], padding=1)
    beta = F.conv3d(a, modulation[0][4:], modulation[1][4:], padding=1)
    normed = (x - x.mean((2, 3, 4), keepdim=True)) / (x.var((2, 3, 4), False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(spade(x, torch.full((2,), k)), normed * (1 + gamma) + beta)


def test_one_input_gives_another_output_for_every_target_of_its_batch():
    z = torch.randn(1, 4, 6, 6, 6).expand(3, -1, -1, -1, -1)
    out = build()(z, torch.arange(3))
    assert all((out[i] - out[j]).abs().mean() > 1e-3 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_other_classes_get_no_gradient():
    network = build()
    network(torch.randn(2, 4, 6, 6, 6), torch.tensor([1, 1])).square().mean().backward()
    switched = [m for m in network.modules() if hasattr(m, "apply_conv")]
    assert len(switched) == 2 * 2 * 3
    for module in switched:
        for parameter in (module.weight, module.bias):
            per_class = parameter.grad.unflatten(0, (3, -1)).flatten(1).abs().sum(1)
            assert per_class[1] > 0 and per_class[0] == per_class[2] == 0


def test_checkpointing_changes_nothing():
    z, label = torch.randn(2, 4, 6, 6, 6), torch.tensor([0, 2])
    grads = []
    for use_checkpoint in (False, True):
        network = build(use_checkpoint=use_checkpoint)
        network(z, label).square().mean().backward()
        grads.append([p.grad for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_weights_survive_the_change_of_memory_layout():
    z, label = torch.randn(2, 4, 6, 6, 6), torch.tensor([0, 2])
    network = build()
    before = network(z, label)
    after = network.to(memory_format=torch.channels_last_3d)(
        z.to(memory_format=torch.channels_last_3d), label
    )
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
