"""More slices than a training window has: blended windows and tiled decoding leave no seam."""

import pytest
import torch
from tests.helpers import compose_part
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from medldm.diffusion.conditioner import Condition
from medldm.diffusion.sampler import AncestralSampler, DDIMSampler
from medldm.diffusion.schedule import cosine_schedule
from medldm.diffusion.windows import Windows, cut_condition, window_starts, windowed
from medldm.errors import InputError
from medldm.networks.layers import per_axis
from medldm.networks.tiling import TiledAutoencoder

SCHEDULE = cosine_schedule(num_timesteps=300)


@pytest.mark.parametrize(
    ("length", "size", "overlap", "starts"),
    [(8, 8, 4, [0]), (6, 8, 4, [0]), (16, 8, 4, [0, 4, 8]), (17, 8, 4, [0, 3, 6, 9]), (9, 8, 0, [0, 1])],
)
def test_windows_cover_an_axis_with_at_least_their_overlap(length, size, overlap, starts):
    found = window_starts(length, size, overlap)
    assert found == starts
    assert found[-1] + min(size, length) == length
    assert all(b - a <= size - overlap for a, b in zip(found, found[1:], strict=False))


def test_a_pointwise_denoiser_gives_the_same_in_windows():
    windows, shape = Windows([4, None, 3], 0.5), (11, 4, 7)
    spade = torch.randn(2, 3, 22, 4, 14)  # a map of twice the grid on two axes

    def build(condition, null):
        pooled = torch.nn.functional.avg_pool3d(condition.spade, (2, 1, 2)).mean(1, keepdim=True)
        return lambda z_t, t: z_t * 0.5 + pooled

    z, t = torch.randn(2, 3, *shape), torch.ones(2)
    condition = Condition(spade=spade)
    whole = build(condition, None)(z, t)
    torch.testing.assert_close(windowed(build, condition, condition, shape, windows)(z, t), whole)


def test_a_condition_is_cut_on_its_own_grid():
    condition = Condition(
        concat=torch.randn(1, 2, 4, 4, 4), embedding=torch.randn(1, 5), spade=torch.randn(1, 3, 8, 16, 4)
    )
    part = cut_condition(condition, (slice(1, 3), slice(0, 2), slice(2, 4)), (4, 4, 4))
    torch.testing.assert_close(part.concat, condition.concat[:, :, 1:3, 0:2, 2:4])
    torch.testing.assert_close(part.spade, condition.spade[:, :, 2:6, 0:8, 2:4])
    assert part.embedding is condition.embedding


def seam_ratio(x, seams):
    """Mean absolute step across the seams over that across all other places, along depth."""
    steps = x.diff(dim=2).abs().mean((0, 1, 3, 4))
    is_seam = torch.zeros(len(steps), dtype=torch.bool)
    is_seam[[s - 1 for s in seams]] = True
    return float(steps[is_seam].mean() / steps[~is_seam].mean())


def window_average(condition, null):
    """A denoiser whose answer depends on its window as a whole, as normalisation and attention make it."""
    return lambda z_t, t: 0.3 * z_t + z_t.mean((2, 3, 4), keepdim=True)


@pytest.mark.parametrize("sampler", [DDIMSampler(num_steps=8), AncestralSampler(num_steps=8)])
def test_blended_windows_leave_no_seam_where_separate_ones_do(sampler):
    shape, size = (32, 4, 4), 8
    noise = torch.randn(1, 2, *shape, generator=torch.Generator().manual_seed(0))
    blended = windowed(window_average, Condition(), Condition(), shape, Windows([size, None, None], 0.5))

    def separate(z_t, t):
        return torch.cat([window_average(None, None)(part, t) for part in z_t.split(size, 2)], 2)

    seams = [8, 16, 24]
    ratios = [
        seam_ratio(sampler(d, SCHEDULE, noise, torch.Generator().manual_seed(1)), seams)
        for d in (separate, blended)
    ]
    assert ratios[0] > 2 and 0.8 < ratios[1] < 1.2, ratios


@pytest.mark.parametrize(("size", "overlap"), [([4, 4], 0.5), ([6, 4, 4], 0.5), ([4, 4, 4], 1.0)])
def test_windows_that_do_not_fit_are_refused_in_one_line(size, overlap):
    with pytest.raises(InputError, match="windows"):
        Windows.of_image(size, (4, 4, 4), overlap)


def trained_statistics(network):
    """Weights of a size at which layers matter, norms with weights of their own."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        fan = max(1, parameter[0].numel()) if parameter.ndim > 1 else 4
        parameter.data = torch.randn(parameter.shape, generator=generator) * fan**-0.5
    return network.eval()


VARIANTS = {
    "strided": {},
    "spade": {"decoder_map_channels": 3},
    "author": {"padding_mode": "replicate", "output_activation": "tanh"},
    "attention": {"mid": ["res", "attn"], "num_heads": 2, "latent_kernel": 3},
    "up_res": {"layout": "up_res", "resample": "conv3", "strides": [2, [1, 2, 2]], "latent_kernel": 3},
    "unit": {"image_range": "unit"},
    "res_up": {"layout": "res_up", "resample": "conv3_end", "decoder_map_channels": 3, "latent_kernel": 3},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tile", [8, (6, 16, 10)])
def test_tiles_equal_the_whole_volume(variant, tile):
    options = {"stem_channels": 8, "channels": [8, 16], "norm_groups": 4, **VARIANTS[variant]}
    network = trained_statistics(compose_part("network/vqgan3d")(3, image_channels=1, **options))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 1, 16, 24, 20, generator=generator)
    mask = None
    if network.decoder_map_channels:
        labels = torch.randint(0, 3, (1, 16, 24, 20), generator=generator)
        mask = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    tiled = TiledAutoencoder(network, tile)
    with torch.no_grad():
        h = network.encode(x)
        whole = network.decode(h, mask)
    torch.testing.assert_close(tiled.encode(x), h, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tiled.decode(h, mask), whole, atol=1e-4, rtol=1e-4)
    assert whole.std() > 0.05


def test_tiles_cost_little_more_than_the_whole():
    with FakeTensorMode():  # shapes alone
        network = compose_part("network/vqgan3d")(3, image_channels=1).eval()
        z = torch.randn(1, 8, 32, 32, 32)  # 128^3
        work = []
        for decode in (network.decode, TiledAutoencoder(network, 64).decode):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                decode(z)
            work.append(counter.get_total_flops())
    assert work[0] < work[1] < 1.3 * work[0]


def test_per_axis_tiles_are_checked():
    with pytest.raises(ValueError, match="spatial axes"):
        per_axis((8, 8), 3)
