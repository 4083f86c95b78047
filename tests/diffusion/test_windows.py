"""More slices than a training window has: blended windows and tiled decoding leave no seam."""

from functools import partial

import pytest
import torch
from tests.helpers import compose_part
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from medldm.batch import one_hot
from medldm.diffusion.condition import Condition
from medldm.diffusion.conditioner import SpatialConditioner
from medldm.diffusion.objective import DenoisingObjective, guided
from medldm.diffusion.sampler import AncestralSampler, DDIMSampler
from medldm.diffusion.schedule import cosine_schedule
from medldm.diffusion.windows import WindowConditions, Windows, cut_condition, window_starts, windowed
from medldm.networks.layers import per_axis
from medldm.networks.tiling import TiledAutoencoder
from medldm.networks.unet import UNet
from medldm.planning.trace import StepTrace

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
        pooled = torch.nn.functional.avg_pool3d(condition().spade, (2, 1, 2)).mean(1, keepdim=True)
        return lambda z_t, t: z_t * 0.5 + pooled

    z, t = torch.randn(2, 3, *shape), torch.ones(2)
    condition = Condition(spade=spade)
    whole = build(lambda: condition, None)(z, t)

    def parts(box):
        return cut_condition(condition, box, shape)

    torch.testing.assert_close(windowed(build, parts, parts, shape, windows)(z, t), whole)


def test_a_condition_is_cut_on_its_own_grid():
    condition = Condition(
        concat=torch.randn(1, 2, 4, 4, 4), embedding=torch.randn(1, 5), spade=torch.randn(1, 3, 8, 16, 4)
    )
    part = cut_condition(condition, (slice(1, 3), slice(0, 2), slice(2, 4)), (4, 4, 4))
    torch.testing.assert_close(part.concat, condition.concat[:, :, 1:3, 0:2, 2:4])
    torch.testing.assert_close(part.spade, condition.spade[:, :, 2:6, 0:8, 2:4])
    assert part.embedding is condition.embedding


DOWNSAMPLING = (2, 4, 4)


def conditioner_of(encoder: str, spade: str | None = None) -> SpatialConditioner:
    torch.manual_seed(0)
    options = {
        "encoder": encoder,
        "spade": spade,
        "use_edges": False,
        "out_channels": 4,
        "spade_out_channels": 4,
    }
    return SpatialConditioner(5, downsampling=DOWNSAMPLING, drop_all_prob=0.1, **options).eval()


def classes(*cells: int) -> dict:
    shape = [n * f for n, f in zip(cells, DOWNSAMPLING, strict=True)]
    return {"mask": torch.randint(0, 5, (1, 1, *shape), generator=torch.Generator().manual_seed(2))}


@pytest.mark.parametrize("factors", [DOWNSAMPLING, (1, 2, 4)])
@pytest.mark.parametrize("encoder", ["nearest_1x1", "rescaler", "unshuffle", "segconv", "area"])
def test_the_part_of_a_map_under_a_window_gives_the_condition_of_the_whole_there(encoder, factors):
    torch.manual_seed(0)
    conditioner = SpatialConditioner(
        5, downsampling=factors, encoder=encoder, use_edges=False, out_channels=4, spade="planes"
    ).eval()
    cells = (2, 9, 3)
    mask = torch.randint(0, 5, (1, 1, *(n * f for n, f in zip(cells, factors, strict=True))))
    conditions = WindowConditions(conditioner, {"mask": mask}, ("mask",), cells, conditioner.halo)
    with torch.no_grad():
        whole = conditioner({"mask": mask})
        for box in Windows([1, 3, None], overlap=0.0).boxes(cells):
            expected, part = cut_condition(whole, box, cells), conditions(box)
            assert torch.equal(part.spade, expected.spade)
            torch.testing.assert_close(part.concat, expected.concat, rtol=0, atol=1e-6)
    reach = {(2, 4, 4): 2, (1, 2, 4): 3}[
        factors
    ]  # in pixels 1 + 2 + 4 of cells of 4, and 1 + 2 + 2 of cells of 2
    assert conditioner.halo == (reach if encoder == "segconv" else 0)


def test_a_condition_with_statistics_of_the_whole_volume_is_made_of_the_whole():
    conditioner, batch = conditioner_of("strided_cnn"), classes(4, 4, 4)
    assert conditioner.halo is None
    with torch.no_grad():
        conditions = WindowConditions(conditioner, batch, ("mask",), (4, 4, 4), None)
        box = (slice(1, 3), slice(0, 4), slice(0, 4))
        assert torch.equal(conditions(box).concat, conditioner(batch).concat[:, :, 1:3])


def denoise_windows(depth: int, keep: int, steps: int = 2) -> tuple[torch.Tensor, int]:
    """x0_hat of a SPADE U-Net in windows of 4 of `depth` slices, and the peak bytes of tensors made there."""
    conditioner, batch, shape = conditioner_of("area", "planes"), classes(depth, 4, 4), (depth, 4, 4)
    sizes = {"stem_channels": 8, "channels": [8, 8], "sinusoidal_channels": 8, "embedding_channels": 8}
    options = {"num_res_blocks": 1, "num_heads": 2, "norm_groups": 4, "zero_init_last": False}
    network = UNet(
        3, in_channels=7, out_channels=2, spade_channels=5, skips="block", **sizes, **options
    ).eval()
    z, t = torch.randn(1, 2, *shape, generator=torch.Generator().manual_seed(3)), torch.ones(1)
    objective = DenoisingObjective("velocity")
    with torch.no_grad(), StepTrace() as trace:
        given, null = (
            WindowConditions(partial(conditioner, drop=drop), batch, ("mask",), shape, conditioner.halo)
            for drop in (None, torch.ones(1, dtype=torch.bool))
        )
        denoise = windowed(
            lambda *both: guided(objective, network, SCHEDULE, *both, scale=2.0),
            given,
            null,
            shape,
            Windows([4, None, None], 0.5, keep),
        )
        for _ in range(steps):
            z = denoise(z, t)
    return z, trace.cost.peak_bytes


def test_windows_whose_condition_is_made_again_give_the_same_samples():
    kept, rebuilt = (denoise_windows(12, keep)[0] for keep in (5, 2))
    assert torch.equal(kept, rebuilt)


def test_memory_of_windows_does_not_grow_with_the_volume():
    """Beyond latents, of which the loop holds a few."""
    latents, planes = 2 * 4 * 4 * 4, 5 * 2 * 16 * 16 * 4  # bytes of a slice of latents, and of its classes

    def grown(keep: int) -> int:
        return denoise_windows(36, keep, steps=1)[1] - denoise_windows(12, keep, steps=1)[1]

    assert 0 <= grown(2) <= 24 * 6 * latents
    assert grown(100) > 24 * 2 * planes > 24 * 6 * latents  # where all are kept, with the null of guidance


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
    blended = windowed(window_average, Condition, Condition, shape, Windows([size, None, None]))

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
    with pytest.raises(ValueError, match="^(size|overlap)="):
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
    mask = given = None
    if network.decoder_map_channels:
        labels = torch.randint(0, 3, (1, 16, 24, 20), generator=generator)
        mask = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
        given = labels[:, None] if tile == 8 else mask  # tiles take the class map itself, too
    tiled = TiledAutoencoder(network, tile)
    with torch.no_grad():
        h = network.encode(x)
        whole = network.decode(h, mask)
    torch.testing.assert_close(tiled.encode(x), h, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tiled.decode(h, given), whole, atol=1e-4, rtol=1e-4)
    assert whole.std() > 0.05


def test_tiles_never_hold_the_planes_of_a_whole_class_map():
    options = {"stem_channels": 8, "channels": [8, 16], "norm_groups": 4}
    classes, peaks = 37, []
    with FakeTensorMode():  # shapes alone
        decoder = compose_part("network/vqgan3d")(
            3, image_channels=1, decoder_map_channels=classes, **options
        )
        encoder = compose_part("network/vqgan3d")(3, image_channels=classes, **options)
        size = [8 * f for f in decoder.downsampling]
        z, labels = torch.randn(1, 8, 8, 8, 8), torch.zeros(1, 1, *size, dtype=torch.long)
        for planes_of in (lambda x: x, lambda x: one_hot(x, classes)):
            for run in (
                lambda m: TiledAutoencoder(decoder.eval(), 8).decode(z, m),
                TiledAutoencoder(encoder.eval(), 8).encode,
            ):
                with StepTrace() as trace:
                    run(planes_of(labels))
                peaks.append(trace.cost.peak_bytes)
    whole = 4 * classes * labels.numel()
    assert peaks[2] - peaks[0] > 0.9 * whole and peaks[3] - peaks[1] > 0.9 * whole


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
