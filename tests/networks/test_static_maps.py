"""A sampler computes what depends on a map alone once, and keeps it no longer than its steps take."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from medldm.devices import mixed_precision
from medldm.diffusion.condition import Condition
from medldm.diffusion.objective import DenoisingObjective
from medldm.diffusion.schedule import fixed_linear_schedule
from medldm.networks.spade import SPADE
from medldm.networks.unet import UNet
from tests.helpers import compose_part
from tests.training import LDM, PIXELS, build, make_batches

SCHEDULE = fixed_linear_schedule(-10, 5)


@pytest.fixture
def made(monkeypatch):
    """One weak reference to gamma for each modulation that is computed."""
    references = []
    compute = SPADE.modulation

    def watched(self, spade, size):
        result = compute(self, spade, size)
        references.append(weakref.ref(result.gamma))
        return result

    monkeypatch.setattr(SPADE, "modulation", watched)
    return references


def alive(references) -> int:
    return sum(reference() is not None for reference in references)


def small_unet(spatial_dims: int, skips: str, **options) -> UNet:
    torch.manual_seed(0)
    extra = {"mid_channels": 16, "up_channels": [16, 8]} if skips == "level" else {}
    sizes = {"stem_channels": 8, "channels": [8, 16], "sinusoidal_channels": 8, "embedding_channels": 16}
    options = {"num_res_blocks": 1, "num_heads": 2, "spade_channels": 3} | sizes | extra | options
    network = UNet(spatial_dims, in_channels=2, out_channels=2, skips=skips, zero_init_last=False, **options)
    return network.eval()


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize(("skips", "shortcut"), [("block", "none"), ("level", "auto"), ("output", "auto")])
def test_modulations_in_the_place_of_the_map_give_the_same_output(spatial_dims, skips, shortcut, made):
    network = small_unet(spatial_dims, skips, shortcut=shortcut)
    grid = (4,) * (spatial_dims - 1) + (8,)
    z, t = torch.randn(2, 2, *grid), torch.tensor([3.0, 700.0])
    condition = Condition(spade=torch.rand(2, 3, *(2 * n for n in grid)))  # a map on a finer grid
    with torch.no_grad():
        expected = network(z, t, condition)
        norms = sum(isinstance(part, SPADE) for part in network.modules())
        assert len(made) == norms
        maps = network.modulations(condition.spade, grid)
        assert len(made) == 2 * norms and alive(made) == norms
        assert torch.equal(network(z, t, condition._replace(spade=maps)), expected)
        assert len(made) == 2 * norms


@pytest.mark.parametrize("is_wrapped", [False, True], ids=["unet", "pixel_unet"])
def test_a_denoiser_computes_the_maps_once_for_each_precision(is_wrapped, made):
    if is_wrapped:
        sizes = {"stem_channels": 8, "channels": [8], "num_res_blocks": 1, "attention_levels": []}
        build_network = compose_part("network/pixel_unet")
        build_network.keywords["unet"].keywords.update(sizes)
        network = build_network(2, in_channels=2, out_channels=2, spade_channels=3).eval()
    else:
        network = small_unet(2, "block")
    norms = sum(isinstance(part, SPADE) for part in network.modules())
    denoise = DenoisingObjective("noise").denoiser(network, SCHEDULE, Condition(spade=torch.rand(1, 3, 8, 8)))
    z, t = torch.randn(1, 2, 8, 8), torch.tensor([0.5])
    with torch.no_grad():
        for _ in range(3):
            denoise(z, t)
        assert len(made) == alive(made) == norms
        with mixed_precision(torch.device("cpu"), "bf16-mixed"):
            for _ in range(2):
                denoise(z, t)
        assert len(made) == 2 * norms and alive(made) == norms
    del denoise
    assert not alive(made)


def test_gradients_flow_through_the_maps_of_a_denoiser(made):
    """Kept ones would be of a graph that the first backward pass has freed."""
    network, spade = small_unet(2, "block"), torch.rand(1, 3, 8, 8, requires_grad=True)
    denoise = DenoisingObjective("noise").denoiser(network, SCHEDULE, Condition(spade=spade))
    gradients = []
    for _ in range(2):
        out = denoise(torch.ones(1, 2, 8, 8), torch.tensor([0.5]))
        gradients.append(torch.autograd.grad(out.sum(), spade)[0])
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0


def test_the_maps_are_gone_when_a_sample_is_decoded(made, monkeypatch):
    network = ("model/network=unet_block", "model/conditioner=spade")
    module = build(LDM, PIXELS[0], *network, "model.sampler.num_steps=3", "model.sampler.guidance_scale=2")
    norms = sum(isinstance(part, SPADE) for part in module.network.modules())
    (batch,) = make_batches(1, 2)
    decode, held = module.decode, []

    def watched(z, batch):
        held.append(alive(made))
        return decode(z, batch)

    monkeypatch.setattr(module, "decode", watched)
    module.eval().sample(batch, ["a", "b"], (16, 16))
    module.interpolate(batch, ["a", "b"], [0.0, 1.0])
    assert len(made) == 3 * norms > 0 and held == [0, 0, 0]


class LiveElements(TorchDispatchMode):
    """Counts the elements of all tensors made inside that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x._base is None and not func.is_view:
                self.now, size = self.now + x.numel(), x.numel()
                weakref.finalize(x, self.release, size)
        self.peak = max(self.peak, self.now)
        return out

    def release(self, size: int) -> None:
        self.now -= size


def test_a_decoder_keeps_no_maps(monkeypatch):
    """A decode uses each once: kept they would be the larger part of its memory."""
    options = {"stem_channels": 8, "channels": [8, 16], "norm_groups": 4, "spade_hidden_channels": 8}
    decoder = compose_part("network/vqgan3d")(3, image_channels=1, decoder_map_channels=3, **options).eval()
    z, planes = torch.randn(1, 8, 4, 4, 4), torch.rand(1, 3, 16, 16, 16)
    compute, hoard = SPADE.modulation, []

    def hoarding(self, spade, size):
        hoard.append(compute(self, spade, size))
        return hoard[-1]

    peaks, images = [], []
    for method in (hoarding, compute):
        monkeypatch.setattr(SPADE, "modulation", method)
        with torch.no_grad(), LiveElements() as live:
            images.append(decoder.decode(z, planes))
        peaks.append(live.peak)
        hoard.clear()
    assert torch.equal(*images) and peaks[1] < 0.6 * peaks[0], peaks
