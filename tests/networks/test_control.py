"""A control branch that adds nothing at first, in 2D and 3D, whatever the arrangement of the skips."""

import pytest
import torch
from torch import nn

from medldm.diffusion.condition import Condition
from medldm.networks.control import ControlledUNet, steps_down, widths_of_controls
from medldm.networks.unet import UNet

SMALL = {"stem_channels": 16, "channels": [16, 24], "embedding_channels": 32, "norm_groups": 8}
ARRANGEMENTS = {
    "block": SMALL | {"num_res_blocks": 2, "attention_levels": [1], "head_channels": 8},
    "level": SMALL | {"up_channels": [24, 16], "attention_levels": [], "num_heads": 2},
    "output": SMALL | {"num_res_blocks": 1, "attention_levels": [], "head_channels": 8},
}
CASES = [(skips, dims, spade) for skips in ARRANGEMENTS for dims in (2, 3) for spade in (None, 3)]


def random_unet(skips="block", dims=2, spade=None):
    """A U-Net none of whose weights is zero."""
    torch.manual_seed(0)
    options = {"skips": skips, "sinusoidal_channels": 16, **ARRANGEMENTS[skips]}
    network = UNet(dims, in_channels=4, out_channels=4, spade_channels=spade, **options)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network


def inputs(dims, spade=None, *, hints=5):
    size = (8,) * dims
    maps = None if spade is None else torch.randn(2, spade, *size)
    condition = Condition(embedding=torch.randn(2, 32), spade=maps, hint=torch.randn(2, hints, *size))
    return torch.randn(2, 4, *size), torch.tensor([10.0, 700.0]), condition


@pytest.mark.parametrize(("skips", "dims", "spade"), CASES)
def test_an_untrained_branch_changes_no_bit(skips, dims, spade):
    base = random_unet(skips, dims, spade).requires_grad_(False)  # frozen weights have other kernels on a CPU
    args = inputs(dims, spade)
    with torch.no_grad():
        expected = base(*args)
        controlled = ControlledUNet(base, 5)
        assert torch.equal(controlled(*args), expected)
        assert expected.std() > 0.01


def open_zeros(branch):
    for layer in (branch.hint, *branch.controls):
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize(("skips", "dims", "spade"), CASES)
def test_all_that_a_branch_adds_reaches_the_output(skips, dims, spade):
    """Each control by itself, and the hint through them."""
    controlled = ControlledUNet(random_unet(skips, dims, spade), 5)
    z, t, condition = inputs(dims, spade)
    with torch.no_grad():
        before = controlled(z, t, condition)
        for control in controlled.branch.controls:
            nn.init.constant_(control.bias, 0.5)
            assert not torch.equal(controlled(z, t, condition), before)
            nn.init.zeros_(control.bias)
        open_zeros(controlled.branch)
        other = condition._replace(hint=-condition.hint)
        assert not torch.equal(controlled(z, t, condition), controlled(z, t, other))


@pytest.mark.parametrize("spade", [None, 3])
def test_gradients_reach_the_branch_only(spade):
    controlled = ControlledUNet(random_unet(spade=spade), 5).train()
    z, t, condition = inputs(2, spade)
    controlled(z, t, condition).square().mean().backward()
    assert all(p.grad is None for p in controlled.base.parameters())
    moved = {name for name, p in controlled.branch.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {
        f"controls.{i}.{part}" for i in range(len(controlled.branch.controls)) for part in ("weight", "bias")
    }
    open_zeros(controlled.branch)
    controlled(z, t, condition).square().mean().backward()
    still = [name for name, p in controlled.branch.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []
    assert not controlled.base.training and controlled.branch.training


def test_the_branch_is_a_copy_of_the_way_down_and_the_middle():
    base = random_unet()
    controlled = ControlledUNet(base, 5)
    for parameter in base.parameters():
        nn.init.normal_(parameter)
    controlled.branch.copy_weights(base)
    own = controlled.branch.state_dict()
    copied = {name for name in own if not name.startswith(("hint.", "controls."))}
    theirs = {name for name in base.state_dict() if name.startswith(("time.", "stem.", "down.", "mid."))}
    assert copied == theirs
    assert all(torch.equal(own[name], base.state_dict()[name]) for name in copied)
    assert all(not own[name].any() for name in own.keys() - copied)


def test_one_control_for_each_skip_and_the_middle():
    """block, two units a level: stem, two units and a downsampling, two units; then the middle."""
    steps = random_unet().steps
    assert widths_of_controls(steps_down(steps), 16) == [16, 16, 16, 16, 24, 24, 24]
    level = random_unet("level").steps
    assert widths_of_controls(steps_down(level), 16) == [16, 16, 24]


def test_what_a_map_alone_decides_is_computed_once_for_base_and_branch():
    controlled = ControlledUNet(random_unet(spade=3), 5)
    open_zeros(controlled.branch)
    for name, parameter in controlled.branch.named_parameters():
        if "gamma" in name:
            nn.init.normal_(parameter)  # unlike the base's
    z, t, condition = inputs(2, 3)
    with torch.no_grad():
        static = condition._replace(spade=controlled.modulations(condition.spade, z.shape[2:]))
        assert torch.equal(controlled(z, t, static), controlled(z, t, condition))


def test_only_a_unet_takes_a_branch():
    with pytest.raises(ValueError, match="a Linear has no skips"):
        ControlledUNet(nn.Linear(2, 2), 5)
    with pytest.raises(ValueError, match="needs condition.hint"):
        z, t, condition = inputs(2)
        ControlledUNet(random_unet(), 5)(z, t, condition._replace(hint=None))
